"""A ranking of ways to run a step: a table, one line that says why, fields for JSON, a picture."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from neo_jax.devices.memory import bytes_text
from neo_jax.files.figure import as_png, new_figure
from neo_jax.tools.plan.report import describe, without_nan
from neo_jax.tools.plan.search import Candidate, by_mesh, pareto

_MOST_ROWS = 40  # of the table

_LESS = {
    "products": "multiplies",
    "vectors": "computes logits",
    "memory": "moves memory",
    "waiting": "waits for other devices",
}


def describe_ranking(candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Returns a ranking as fields for JSON, with the whole plan where one was made."""
    return {
        "considered": len(candidates),
        "why": why(candidates),
        "ranking": [
            without_nan({**_fields(each), "plan": describe(each.plan) if each.plan else None})
            for each in by_mesh(candidates)
        ],
        "pareto": [without_nan(_fields(each)) for each in pareto(candidates)],
    }


def _fields(each: Candidate) -> dict[str, Any]:
    choice, how = each.choice, {}
    if choice:
        how = {"remat": choice.remat, "accumulation": choice.accumulation, "kernel": choice.kernel}
    return {
        "mesh": each.mesh,
        "rules": each.rules,
        **how,
        "estimate": {"memory": each.memory, "ms": 1e3 * each.seconds, "fits": each.fits},
    }


def ranking_lines(candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yields a ranking as a table, a line a mesh, then what nothing beats in time and memory."""
    shown = by_mesh(candidates)
    yield f"{'':<58}{'a device':>10}{'step':>13}"
    for each in shown[:_MOST_ROWS]:
        yield _line(each.best, "compiled" if each.plan else "by arithmetic")
    front = pareto(candidates)
    if len(front) > 1:
        yield "\nnone is both faster and smaller, by arithmetic"
        yield from (_line(each, "") for each in front)
    if len(candidates) == 1:
        for name, seconds in candidates[0].best.times.parts.items():
            yield f"  {name:<20}{1e3 * seconds:>10.2f} ms"
        return
    yield f"\n{len(candidates):,} ways considered. {why(candidates)}"
    first = candidates[0]
    if first.choice and first.best.fits:
        yield first.choice.options


def _line(each: Candidate, note: str) -> str:
    time = f"{1e3 * each.seconds:.2f} ms" if math.isfinite(each.seconds) else ""
    note = ", ".join(text for text in (note, "" if each.fits else "does not fit") if text)
    return f"{_name(each):<58}{bytes_text(each.memory):>10}{time:>13}  {note}".rstrip()


def _name(each: Candidate) -> str:
    choice = each.choice
    if choice is None:
        return f"{each.mesh:<28}{each.rules}"
    parts = f" x{choice.accumulation}" if choice.accumulation > 1 else ""
    kernel = "" if choice.kernel == "auto" else f" {choice.kernel}"
    return f"{each.mesh} remat={choice.remat}{parts}{kernel}"


def why(candidates: Sequence[Candidate]) -> str:
    """Returns in a sentence why the first wins, against the next mesh and what does not fit."""
    first = candidates[0].best
    if not first.fits:
        return "Nothing fits: take more devices or a smaller batch."
    if not math.isfinite(first.seconds):
        return f"{first.mesh} sends least."
    told = f"{_name(first)} wins"
    like = [each for each in candidates[1:] if bool(each.plan) == bool(first.plan)]
    others = [each.best for each in like if each.mesh != first.mesh and each.best.fits]
    if others and math.isfinite(others[0].seconds):
        told += f": {_against(first, others[0])}"
    paper = candidates[0]
    faster = [each for each in candidates if not each.fits and each.seconds < paper.seconds]
    if faster:
        best = min(faster, key=lambda each: each.seconds)
        told += f"; {_name(best)} would be faster, but needs {bytes_text(best.memory)}"
    return f"{told}."


def _against(first: Candidate, other: Candidate) -> str:
    ours, theirs = first.times.parts, other.times.parts
    most = max(ours, key=lambda name: theirs[name] - ours[name])
    saved = theirs[most] - ours[most]
    share = other.seconds / first.seconds - 1
    if saved <= 0:
        return f"as fast as {_name(other)}"
    return f"next to {_name(other)}, {share:.1%} slower, it {_LESS[most]} {1e3 * saved:.2f} ms less"


def draw_ranking(candidates: Sequence[Candidate], title: str) -> bytes:
    """Returns a PNG: every way by memory and time, those that nothing beats, those compiled.

    Where the chip is not known what a device sends stands in the place of the time.
    """
    figure = new_figure(9, 6, title)
    plot = figure.subplots()
    for fits, color, label in ((True, "#9ecae1", "fits"), (False, "#fcae91", "does not fit")):
        points = [each for each in candidates if each.fits == fits]
        _scatter(plot, points, s=14, color=color, label=label)
    front = pareto(candidates)
    if front:
        plot.step(*_places(front), where="pre", color="#08519c", label="nothing beats")
        _label(plot, front[-1])
    made = [each.best for each in candidates if each.plan and each.plan.prediction]
    _scatter(plot, made, s=60, color="black", marker="x", label="compiled")
    _label(plot, made[0] if made else candidates[0])
    limit = candidates[0].limit
    if math.isfinite(limit):
        plot.axvline(limit / 1e9, color="black", linestyle="--", label="limit")
    known = math.isfinite(candidates[0].seconds)
    plot.set_xscale("log")
    plot.set_yscale("log" if known else "linear")
    for axis in (plot.xaxis, *([plot.yaxis] if known else [])):
        _plain_numbers(axis)
    plot.set_xlabel("memory of a device, GB")
    plot.set_ylabel("predicted time of a step, ms" if known else "what a device sends a step, GB")
    plot.legend(fontsize=8)
    return as_png(figure)


def _plain_numbers(axis: Any) -> None:
    """Writes numbers of a logarithmic axis out, some within each power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    within = (1, 2, 5) if high > 20 * low else (1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8)
    axis.set_major_locator(LogLocator(subs=within))
    axis.set_major_formatter("{x:,g}")
    axis.set_minor_formatter(NullFormatter())


def _places(points: Sequence[Candidate]) -> tuple[list[float], list[float]]:
    heights = [
        1e3 * each.seconds if math.isfinite(each.seconds) else each.sent / 1e9 for each in points
    ]
    return [each.memory / 1e9 for each in points], heights


def _scatter(plot: Any, points: Sequence[Candidate], label: str, **options: Any) -> None:
    if points:
        plot.scatter(*_places(points), label=label, **options)


def _label(plot: Any, each: Candidate) -> None:
    (memory,), (height,) = _places([each])
    plot.annotate(
        _name(each), (memory, height), fontsize=7, xytext=(5, 5), textcoords="offset points"
    )
