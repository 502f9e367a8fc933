"""Plans next to each other: two strategies, programs or versions, from the JSON of each."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from neo_jax.devices.memory import bytes_text
from neo_jax.errors import NeoError
from neo_jax.files.figure import as_png, new_figure
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path


class Saved(NamedTuple):
    """What a plan's JSON says of a device; bytes and milliseconds of a step."""

    name: str
    facts: dict[str, str]  # topology, mesh and the like
    memory: dict[str, float]  # by part
    capacity: float  # NaN where it is not known
    traffic: dict[str, float]  # sent, by axes of the mesh
    times: dict[str, float]  # by bound, the step last; NaN where it is not known
    predicted: dict[str, float]  # the times of a step's parts, the step last; empty if not known
    tokens_per_second: float  # as predicted, or else at most; NaN where it is not known


def read_plans(paths: Sequence[str]) -> list[Saved]:
    """Reads what `neo-jax plan --json` wrote.

    Of a search that is the best plan, of servers the largest.

    Raises:
      NeoError: a file cannot be read, or is something else.
    """
    names = [make_path(path).stem for path in paths]
    distinct = len(set(names)) == len(names)
    return [_read(path, names[i] if distinct else path) for i, path in enumerate(paths)]


def _read(path: str, name: str) -> Saved:
    fields: Any = read_json(path)
    try:
        if fields.get("ranking"):
            fields = fields["ranking"][0]["plan"]
        elif fields.get("servers"):
            fields = fields["servers"][-1]["plan"]
        return _saved(name, fields)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        raise NeoError(f"{path} is no plan; write one with neo-jax plan --json > {path}.") from None


def _saved(name: str, fields: dict[str, Any]) -> Saved:
    memory, step = fields["memory"], fields["roofline_ms"] or {}
    predicted = fields.get("predicted") or {}
    parts = {part: float(size) for part, size in memory["parts"].items()}
    if memory["temporaries"] is not None:
        parts["temporaries"] = float(memory["temporaries"])
    sent: dict[str, float] = {}
    for row in fields["collectives"]:
        axes = "+".join(row["axes"]) + (" (network)" if row["between_slices"] else "")
        sent[axes] = sent.get(axes, 0.0) + row["wire_bytes"]
    facts = {
        "topology": str(fields["topology"]),
        "devices": f"{fields['devices']} x {fields['device_kind']}",
        "mesh": ", ".join(f"{axis}={size}" for axis, size in fields["mesh"].items()),
        "rules": ", ".join(f"{axis}:{'+'.join(to)}" for axis, to in fields["rules"].items()),
        "tokens a step": f"{fields['tokens']:,}",
        "fits": "yes" if fields["fits"] else "no",
    }
    return Saved(
        name,
        facts,
        {**parts, "total": float(memory["total"])},
        _known(memory["capacity"]),
        {axes: size for axes, size in sent.items() if size},
        {bound: _known(value) for bound, value in step.items()},
        {part: _known(value) for part, value in predicted.get("ms", {}).items()},
        _known(predicted.get("tokens_per_second", fields["tokens_per_second"])),
    )


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


def describe(plans: Sequence[Saved]) -> dict[str, Any]:
    """Returns plans as fields for JSON, each quantity with a value a plan; None is unknown."""
    rows = [
        {
            "part": part,
            "name": name,
            "values": [None if math.isnan(value) else value for value in values],
        }
        for part, name, values in _rows(plans)
    ]
    return {
        "plans": [plan.name for plan in plans],
        "facts": [plan.facts for plan in plans],
        "rows": rows,
    }


def _rows(plans: Sequence[Saved]) -> Iterator[tuple[str, str, list[float]]]:
    """Yields what is compared: of what, its name, and a value a plan."""
    absents = {"memory": 0.0, "traffic": 0.0, "times": math.nan, "predicted": math.nan}
    for part, absent in absents.items():
        names = dict.fromkeys(name for plan in plans for name in getattr(plan, part))
        last = [name for name in _TOTALS if name in names]
        for name in [*(each for each in names if each not in last), *last]:
            yield part, name, [getattr(plan, part).get(name, absent) for plan in plans]
        if part == "traffic":
            yield part, "all", [sum(plan.traffic.values()) for plan in plans]
    yield "speed", "tokens/s", [plan.tokens_per_second for plan in plans]


_TITLES = {
    "memory": "memory of a device",
    "traffic": "sent by a device a step, by mesh axes",
    "times": "least time of a step",
    "predicted": "predicted time of a step",
    "speed": "speed",
}


def lines(plans: Sequence[Saved]) -> Iterator[str]:
    """Yields plans as columns of a table; the last columns are ratios to the first plan."""
    for fact in plans[0].facts:
        if len({plan.facts[fact] for plan in plans}) == 1:
            yield f"{fact:<20}{plans[0].facts[fact]}"
            continue
        for number, plan in enumerate(plans):
            yield f"{'' if number else fact:<20}{plan.name}: {plan.facts[fact]}"
    widths = [max(14, len(plan.name) + 2) for plan in plans]
    yield "\n" + _line("", [plan.name for plan in plans], widths)
    before = ""
    for part, name, values in _rows(plans):
        if part != before:
            yield f"\n{_TITLES[part]}"
            before = part
        ratios = "".join(f"{_ratio(value, values[0]):>9}" for value in values[1:])
        yield _line(f"  {name}", [_text(part, value) for value in values], widths) + ratios
    for plan in plans:
        if not math.isnan(plan.capacity) and plan.memory["total"] > plan.capacity:
            yield f"\n{plan.name} does not fit in {bytes_text(plan.capacity)} a device"


def _line(name: str, texts: Sequence[str], widths: Sequence[int]) -> str:
    cells = "".join(f"{text:>{width}}" for text, width in zip(texts, widths, strict=True))
    return f"{name:<20}{cells}"


def _text(part: str, value: float) -> str:
    if math.isnan(value):
        return "unknown"
    if part in ("times", "predicted"):
        return f"{value:.2f} ms"
    return f"{value:,.0f}" if part == "speed" else bytes_text(value)


def _ratio(value: float, first: float) -> str:
    return f"x {value / first:.2f}" if first and not math.isnan(value / first) else ""


def draw(plans: Sequence[Saved]) -> bytes:
    """Returns a PNG: memory by part, traffic by axes, time by bound, and the predicted time."""
    figure = new_figure(12, 5 + 0.8 * len(plans), " | ".join(plan.name for plan in plans))
    (memory, traffic), (bounds, predicted) = figure.subplots(2, 2)
    for axes, part, unit, title in (
        (memory, "memory", 1e9, "memory of a device, GB"),
        (traffic, "traffic", 1e9, "sent by a device a step, GB"),
        (predicted, "predicted", 1.0, "predicted time of a step, ms"),
    ):
        _draw_parts(axes, [getattr(plan, part) for plan in plans], [p.name for p in plans], unit)
        axes.set_title(title, fontsize=10)
    for capacity in {plan.capacity for plan in plans if not math.isnan(plan.capacity)}:
        memory.axvline(capacity / 1e9, color="black", linestyle="--", label="capacity")
        memory.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    names = dict.fromkeys(name for plan in plans for name in plan.times if name != "step")
    height = 0.8 / len(plans)
    for number, plan in enumerate(plans):
        places = [i + (number - (len(plans) - 1) / 2) * height for i in range(len(names))]
        found = [plan.times.get(name, math.nan) for name in names]
        known = [0.0 if math.isnan(time) else time for time in found]
        bounds.barh(places, known, height, label=plan.name)
    bounds.set_yticks(range(len(names)), list(names))
    bounds.invert_yaxis()
    bounds.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)
    bounds.set_title("least time of a step, ms", fontsize=10)
    return as_png(figure)


def _draw_parts(
    axes: Any, plans: Sequence[dict[str, float]], names: Sequence[str], unit: float
) -> None:
    """Draws a bar a plan, of its parts one after another."""
    parts = dict.fromkeys(name for plan in plans for name in plan if name not in _NO_PARTS)
    left = [0.0] * len(plans)
    for part in parts:
        found = [plan.get(part, math.nan) / unit for plan in plans]
        sizes = [0.0 if math.isnan(size) else size for size in found]
        axes.barh(names, sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    axes.invert_yaxis()
    if parts:
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3)


_TOTALS = ("total", "step")  # what parts add up to, or the slowest of them
_NO_PARTS = (*_TOTALS, "collectives")  # these run next to other work
