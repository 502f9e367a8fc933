"""An explanation as tables for people, fields for JSON, and a picture of memory over time."""

import collections
import linecache
from collections.abc import Iterator, Sequence
from typing import Any

from neo_jax.devices.memory import bytes_text
from neo_jax.files.figure import as_png, new_figure
from neo_jax.tools.plan.explanation import Explanation, Moved
from neo_jax.tools.plan.origin import Frame
from neo_jax.tools.plan.peak import Held, without_numbers

_MOST_ROWS = 12  # of a table
_SMALL = 0.005  # of all that is sent: what is less is one row

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
    "temporary": "#bdbdbd",
}


def draw(explanation: Explanation) -> bytes:
    """Returns a PNG: memory over the instructions of a step, and what fills it at the peak."""
    peak = explanation.peak
    shown = [*peak.held[:_MOST_ROWS]]
    figure = new_figure(12, 3 + 0.3 * len(shown), f"{bytes_text(peak.total)} a device at the peak")
    over, at_peak = figure.subplots(2, 1, height_ratios=[1.2, 0.3 + 0.18 * len(shown)])
    over.fill_between(range(len(peak.curve)), [size / 1e9 for size in peak.curve], step="post")
    over.axvline(peak.time, color="black", linestyle="--")
    over.set_ylim(bottom=0)
    over.set_xlim(0, max(len(peak.curve) - 1, 1))
    over.set_xlabel("instructions, a loop's once")
    over.set_ylabel("GB a device")
    for number, each in enumerate(shown):
        at_peak.barh([number], [each.size / 1e9], color=_COLORS[each.role])
    at_peak.set_yticks(range(len(shown)), [_label(each) for each in shown], fontsize=8)
    at_peak.invert_yaxis()
    at_peak.set_xlabel("GB a device at the peak")
    for role in dict.fromkeys(each.role for each in shown):
        at_peak.barh([0], [0], color=_COLORS[role], label=role)
    at_peak.legend(fontsize=8, loc="lower right")
    return as_png(figure)


def _label(each: Held) -> str:
    name = each.name if len(each.name) < 60 else f"...{each.name[-57:]}"
    return f"{name}  {each.line}" if each.line else name
