"""A search for people and for programs: a table, fields for JSON, a picture."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from neo_jax.files.figure import as_png, new_figure
from neo_jax.tools.plan import report
from neo_jax.tools.plan.search import Candidate


def describe(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """Returns a ranking as fields for JSON, with the whole plan where one was made."""
    return [
        {
            "mesh": each.mesh,
            "rules": each.rules,
            "estimate": {"memory": each.memory, "ms": 1e3 * each.seconds, "fits": each.fits},
            "plan": report.describe(each.plan) if each.plan else None,
        }
        for each in candidates
    ]


def lines(candidates: Sequence[Candidate]) -> Iterator[str]:
    """Yields a ranking as a table, line by line."""
    yield f"{'mesh':<28}{'rules':<14}{'a device':>10}{'step':>13}"
    for each in candidates:
        seconds, memory = measures(each)
        fits = each.plan.fits if each.plan else each.fits
        time = f"{1e3 * seconds:.2f} ms" if math.isfinite(seconds) else ""
        source = "compiled" if each.plan else "by arithmetic"
        note = source if fits else f"{source}, does not fit"
        size = report.bytes_text(memory)
        yield f"{each.mesh:<28}{each.rules:<14}{size:>10}{time:>13}  {note}"


def draw(candidates: Sequence[Candidate], title: str) -> bytes:
    """Returns a PNG of a ranking: the least time of a step, and the memory of a device."""
    figure = new_figure(10, 1.5 + 0.3 * len(candidates), title)
    times, memories = figure.subplots(1, 2, sharey=True)
    for each in reversed(candidates):
        name = f"{each.mesh} {each.rules}"
        seconds, memory = measures(each)
        color = "#08306b" if each.plan else "#9ecae1"
        times.barh([name], [1e3 * seconds], color=color)
        memories.barh([name], [memory / 1e9], color=color if not each.order[0] else "#cb181d")
    times.set_xlabel("least time of a step, ms (dark: compiled)")
    memories.set_xlabel("memory of a device, GB (red: does not fit)")
    return as_png(figure)


def measures(candidate: Candidate) -> tuple[float, float]:
    """Returns seconds a step and bytes a device, of the compiled program where there is one."""
    plan = candidate.plan
    if plan is None:
        return candidate.seconds, candidate.memory
    return plan.roofline.step if plan.roofline else math.nan, plan.memory.total
