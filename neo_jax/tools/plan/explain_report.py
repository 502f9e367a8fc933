"""An explanation as tables for people, fields for JSON, and a picture of memory over time."""

import collections
import linecache
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from neo_jax.devices.memory import bytes_text
from neo_jax.files.figure import FAINT, INK, as_png, legend_below, name_rows, new_figure
from neo_jax.tools.plan.explanation import Explanation, Moved
from neo_jax.tools.plan.origin import Frame
from neo_jax.tools.plan.peak import ELSE, Held, without_numbers

_MOST_ROWS = 12  # of a table
_SMALL = 0.005  # of all that is sent: what is less is one row

_GAPS = "between arrays, in the block that the compiler sets aside for them"

_NEEDED = {
    "argument": "split as it is, it must be gathered where it is used",
    "gradient": "each device has a part of the batch: the sum needs all of them",
    "sum": "each device has a part of the axis that is summed over",
    "activation": "",
}


def describe(explanation: Explanation) -> dict[str, Any]:
    """Returns an explanation as fields for JSON; bytes are of a device, None is unknown."""
    peak = explanation.peak
    return {
        "mesh": dict(explanation.mesh),
        "collectives": [
            {
                "kind": row.kind,
                "axes": list(row.axes),
                "times": row.times,
                "wire_bytes": row.wire_bytes,
                "role": row.role,
                "name": row.name,
                "shape": row.shape,
                "operation": row.origin.operation,
                "line": _place(row.origin.line),
                "stack": [_place(frame) for frame in row.origin.frames],
                "made_at": _place(row.made.line),
                "findings": [
                    {
                        "rule": each.rule,
                        "text": each.text,
                        "saved_bytes": each.saved,
                        "line": _place(each.line or row.origin.line),
                    }
                    for each in row.findings
                ],
            }
            for row in explanation.moved
        ],
        "peak": {
            "bytes": peak.total,
            "compiler": explanation.expected,
            "gaps": explanation.gaps,
            "line": _place(peak.running),
            "arrays": [_array(each) for each in peak.held],
            "changes": [
                {"name": each.name, "text": each.text, "saved_bytes": each.saved}
                for each in peak.changes
            ],
        },
    }


def _array(held: Held) -> dict[str, Any]:
    return {
        "name": held.name,
        "role": held.role,
        "number": held.number,
        "bytes": held.size,
        "shape": held.shape.partition("{")[0],
        "line": _place(held.line),
    }


def _place(frame: Frame | None) -> dict[str, Any] | None:
    return frame._asdict() if frame else None


def lines(explanation: Explanation) -> Iterator[str]:
    """Yields an explanation as two tables, line by line: what is sent, and what is held."""
    yield from _sent_lines(explanation.moved)
    yield from _held_lines(explanation)


def _sent_lines(moved: Sequence[Moved]) -> Iterator[str]:
    total = sum(row.wire_bytes for row in moved)
    groups = [group for group in grouped(moved) if group[0].wire_bytes]
    if not groups:
        yield "sends nothing"
        return
    yield f"sends {bytes_text(total)} a device"
    yield f"  {'bytes':>10}{'times':>7}  {'collective':<19}{'along':<14}what, and the line"
    shown = [
        group
        for number, group in enumerate(groups)
        if number < _MOST_ROWS and (_bytes(group) > _SMALL * total or number < 3)
    ]
    for group in shown:
        row = group[0]
        axes = "+".join(row.axes)
        times = sum(each.times for each in group)
        same = len({each.name for each in group}) == 1
        name = row.name if same else without_numbers(row.name)
        size = bytes_text(_bytes(group))
        yield f"  {size:>10}{times:>7}  {row.kind:<19}{axes:<14}{name} {row.shape}"
        if row.origin.line:
            yield f"{'':>21}{_source(row.origin.line)}"
        yield from _finding_lines(group)
    rest = groups[len(shown) :]
    if rest:
        small, count = sum(map(_bytes, rest)), sum(each.times for group in rest for each in group)
        yield f"  {bytes_text(small):>10}{count:>7}  in {len(rest)} smaller rows"


def _finding_lines(group: Sequence[Moved]) -> Iterator[str]:
    if not group[0].findings:
        why = _NEEDED[group[0].role]
        if why:
            yield f"{'':>21}{why}"
    for number, finding in enumerate(group[0].findings):
        saved = sum(row.findings[number].saved for row in group)
        yield f"{'':>19}! {finding.text}; {bytes_text(saved)} less"
        if finding.line and finding.line != group[0].origin.line:
            yield f"{'':>21}{_source(finding.line)}"


def grouped(moved: Sequence[Moved]) -> list[list[Moved]]:
    """Returns what is moved alike, by one line, together: the most bytes first."""
    groups: dict[tuple, list[Moved]] = collections.defaultdict(list)
    for row in moved:
        rules = tuple(finding.rule for finding in row.findings)
        key = row.kind, row.axes, row.role, without_numbers(row.name), row.origin.line, rules
        groups[key].append(row)
    return sorted(groups.values(), key=lambda group: -_bytes(group))


def _bytes(group: Sequence[Moved]) -> int:
    return sum(row.wire_bytes for row in group)


def _source(frame: Frame | None) -> str:
    """Returns a line and what is written there, if its file is here."""
    if frame is None:
        return ""
    text = linecache.getline(frame.file, frame.line).strip()
    return f"{frame}  {text}".rstrip()


def _held_lines(explanation: Explanation) -> Iterator[str]:
    peak, expected = explanation.peak, explanation.expected
    said = f", {bytes_text(expected)} as the compiler says" if expected else ""
    yield f"\nholds {bytes_text(peak.total)} a device at most{said}"
    if peak.running:
        yield f"  at {_source(peak.running)}"
    yield f"  {'bytes':>10}{'arrays':>8}  {'kind':<11}what, and the line"
    for each in peak.held[:_MOST_ROWS]:
        shape = each.shape.partition("{")[0]
        place = f"  {each.line}" if each.line else ""
        size, count = bytes_text(each.size), each.number or ""
        yield f"  {size:>10}{count:>8}  {each.role:<11}{each.name} {shape}{place}".rstrip()
    rest = peak.held[_MOST_ROWS:]
    if rest:
        size, number = bytes_text(sum(each.size for each in rest)), sum(e.number for e in rest)
        yield f"  {size:>10}{number:>8}  in {len(rest)} smaller rows"
    if explanation.gaps > _SMALL * peak.total:
        yield f"  {bytes_text(explanation.gaps):>10}{'':>8}  {_GAPS}"
    if peak.changes:
        yield "what would lower it most, each alone"
    for change in peak.changes:
        yield f"  {bytes_text(change.saved):>10}  {change.text}"


_COLORS = {
    "argument": "#9ecae1",
    "copy": "#3182bd",
    "gradient": "#e6550d",
    "kept": "#31a354",
    "result": "#756bb1",
    "temporary": "#969696",
    ELSE: "#e3e3e3",
}


def draw(explanation: Explanation) -> bytes:
    """Returns a PNG: memory over the instructions of a step, and what fills it at the peak."""
    peak = explanation.peak
    shown = [*peak.held[:_MOST_ROWS]]
    unit, name = (1e9, "GB") if peak.total >= 1e9 else (1e6, "MB")
    figure = new_figure(12, 3.4 + 0.3 * len(shown))
    over, at_peak = figure.subplots(2, 1, height_ratios=[1.2, 0.3 + 0.18 * len(shown)])
    last = max(len(peak.curves[ELSE]) - 1, 1)
    below = np.zeros(len(peak.curves[ELSE]))
    for role, color in _COLORS.items():
        if any(peak.curves.get(role, ())):
            above = below + np.array(peak.curves[role]) / unit
            times = range(len(above))
            over.fill_between(times, below, above, step="post", color=color, label=role, lw=0)
            below = above
    over.axvline(peak.time, color=INK, linestyle="--", label="the peak")
    if explanation.gaps > _SMALL * peak.total:
        total = (explanation.expected or 0) / unit
        over.axhline(total, color=FAINT, linestyle=":", label="with what is between arrays")
    over.set_ylim(bottom=0)
    over.set_xlim(0, last)
    over.set_xlabel("instructions, a loop's once")
    over.set_ylabel(f"{name} a device")
    place = f" at {peak.running}" if peak.running else ""
    over.set_title(
        f"memory over a step: at most {bytes_text(peak.total)} a device{place}", loc="left"
    )
    at_peak.set_title("what is there at the peak, and the line that makes it", loc="left")
    bars = [each.size / unit for each in shown]
    drawn = at_peak.barh(range(len(shown)), bars, color=[_COLORS[each.role] for each in shown])
    at_peak.bar_label(drawn, [bytes_text(each.size) for each in shown], padding=3, fontsize=8)
    name_rows(at_peak, [_label(each) for each in shown], size=8)
    at_peak.margins(x=0.1)
    at_peak.set_xlabel(f"{name} a device")
    legend_below(figure, over, ncols=5)
    return as_png(figure)


def _label(each: Held) -> str:
    name = each.name if len(each.name) < 60 else f"...{each.name[-57:]}"
    return f"{name}  {each.line}" if each.line else name
