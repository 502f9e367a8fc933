"""What fills a device's memory when most of it is taken, and what would lower that."""

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from neo_jax.tools.plan.dataflow import Flow, Source, Value
from neo_jax.tools.plan.hlo import sizes
from neo_jax.tools.plan.lifetimes import Life, Timeline
from neo_jax.tools.plan.origin import Frame, Origin, Origins

Role = Literal["argument", "copy", "gradient", "kept", "result", "temporary"]
"""What an array is for: of the program's arguments; one of them gathered or cast; a gradient;
kept for the backward pass; a result of the program; or none of these."""

ELSE = "at other times"
"""The role, in curves, of what is not there at the peak."""

_MOST = 1000  # arrays of a peak that are looked at, the largest
_BEST = 3  # changes that are reported


class Held(NamedTuple):
    """Arrays of one name, and of one line."""

    name: str
    role: Role
    number: int
    size: int  # bytes of all of them
    shape: str  # of the largest
    line: Frame | None


class Change(NamedTuple):
    """What would lower the peak."""

    name: str
    text: str
    saved: int  # bytes of the peak


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most memory that is taken at a time."""

    total: int  # bytes
    time: int  # in instructions from the start
    running: Frame | None  # the line that runs then
    held: Sequence[Held]  # what adds up to the total, the largest first
    changes: Sequence[Change]  # that would lower it most, the best first
    curves: Mapping[str, Sequence[float]]  # bytes at each time by role, of what is not there: ELSE


def find_peak(timeline: Timeline, flow: Flow, origins: Origins, whole: Mapping[str, int]) -> Peak:
    """Finds the peak of a program.

    Args:
      timeline: its arrays.
      flow: its values.
      origins: its lines.
      whole: arguments of which every device holds all, and into how many parts they could be split.
    """
    curve, time = timeline.curve(), timeline.peak
    arrays = [_name(life, timeline, flow, origins) for life in timeline.alive(time)[:_MOST]]
    running = origins.of(timeline.running[time]).line if timeline.running else None
    held = _grouped(arrays)
    total = int(curve[time]) if len(curve) else 0
    rest = total - sum(each.size for each in held)
    if rest:
        held.append(Held("smaller arrays", "temporary", 0, rest, "", None))
    changes = [
        Change(change.name, change.text, total - int(max(timeline.curve(change.size), default=0)))
        for change in _changes(arrays, timeline, origins, whole)
    ]
    worth = [change for change in changes if change.saved > 0.01 * total]
    worth.sort(key=lambda change: -change.saved)
    roles: dict[int, str] = {each.life.buffer: each.role for each in arrays}
    names = [*dict.fromkeys(each.role for each in held), ELSE]
    curves = {name: timeline.curve(_of_role(name, roles)).tolist() for name in names}
    return Peak(total, time, running, held, worth[:_BEST], curves)


def _of_role(name: str, roles: Mapping[int, str]) -> Callable[[Life], float]:
    """Returns the bytes of an array of a role, 0 of others."""
    return lambda life: life.size if roles.get(life.buffer, ELSE) == name else 0


class _Array(NamedTuple):
    """An array of the peak, and what it is."""

    life: Life
    name: str
    role: Role
    origin: Origin


def _name(life: Life, timeline: Timeline, flow: Flow, origins: Origins) -> _Array:
    if life.is_argument:
        origin = origins.of(life.instruction)
        return _Array(life, origin.operation or life.instruction.name, "argument", origin)
    value = Value(life.computation, life.instruction.name, life.index)
    source = maker(flow, value)
    origin = _first_known(source, origins)
    if source.is_argument:
        moved = any(each.opcode.startswith("all-gather") for each in source.passed)
        name = f"{origin.operation or source.instruction.name}, {'gathered' if moved else 'copied'}"
        line = _first_known(source._replace(instruction=source.passed[-1]), origins)
        return _Array(life, name, "copy", line._replace(operation=origin.operation))
    updated = flow.updated(value)
    if updated is not None:
        return _Array(life, f"gradient of {origins.of(updated).operation}", "gradient", origin)
    name = origin.operation or source.instruction.opcode
    last = origins.of(timeline.running[min(life.end, len(timeline.running) - 1)])
    if life.end >= len(timeline.running) - 1:
        return _Array(life, name, "result", origin)
    kept = last.is_backward and not origin.is_backward
    return _Array(life, name, "kept" if kept else "temporary", origin)


_WRITTEN = {"dynamic-update-slice": 1}  # operands that are a part of the result
_PACKED = {**_WRITTEN, "pad": 0, "concatenate": 0}


def maker(flow: Flow, value: Value, packed: bool = False) -> Source:
    """Returns where a value was made; of one that is written in parts, where a part was.

    `packed` looks through what a compiler puts together to move it at a time, too.
    """
    source = flow.source(value)
    for _ in range(8):
        number = (_PACKED if packed else _WRITTEN).get(source.instruction.opcode)
        if number is None:
            break
        part = source.instruction.operands[number]
        source = flow.source(Value(source.value.computation, part))
    return source


def _first_known(source: Source, origins: Origins) -> Origin:
    """Returns the origin of what made a value, or else of what it went through."""
    for each in (source.instruction, *reversed(source.passed)):
        origin = origins.of(each)
        if origin.operation and (origin.frames or source.is_argument):
            return origin
    return origins.of(source.instruction)


def without_numbers(name: str) -> str:
    """Returns a name with stars for numbers: that of a layer is that of all."""
    return re.sub(r"(?<![a-z])\d+|(?<=[_\[])\d+", "*", name)


def _grouped(arrays: Sequence[_Array]) -> list[Held]:
    groups: dict[tuple, list[_Array]] = collections.defaultdict(list)
    for each in arrays:
        groups[without_numbers(each.name), each.role, each.origin.line].append(each)
    held = [
        Held(
            group[0].name if len({each.name for each in group}) == 1 else name,
            role,
            len(group),
            sum(each.life.size for each in group),
            max(group, key=lambda each: each.life.size).life.shape,
            line,
        )
        for (name, role, line), group in groups.items()
    ]
    return sorted(held, key=lambda each: -each.size)


class _Candidate(NamedTuple):
    name: str
    text: str
    size: Callable[[Life], float]


def _changes(
    arrays: Sequence[_Array], timeline: Timeline, origins: Origins, whole: Mapping[str, int]
) -> list[_Candidate]:
    """Returns what could be changed, each with what every array would take then."""
    found = []

    def add(name: str, text: str, parts: Mapping[int, float]) -> None:
        if parts:  # by place, the part of it that would be left
            found.append(
                _Candidate(name, text, lambda life: life.size * parts.get(life.buffer, 1.0))
            )

    def chosen(role: Role) -> list[_Array]:
        return [each for each in arrays if each.role == role and len(sizes(each.life.shape)) > 1]

    kept, temporary = chosen("kept"), chosen("temporary")
    marked = any("remat" in each.attributes or "checkpoint" in each.attributes
                 for each in timeline.running)  # fmt: skip
    if kept and not marked:
        add(
            "recompute",
            f"compute again in the backward pass what {_where(kept)} and others keep for it: "
            "jax.checkpoint, or --remat full",
            {each.life.buffer: 0.0 for each in kept},
        )
    if kept:
        add(
            "accumulate",
            "take half of the batch at a time and add up the gradients: --accumulation 2",
            {each.life.buffer: 0.5 for each in kept + temporary},
        )
    add("donate", *_donated(arrays, timeline, origins))
    add(
        "shard",
        "split what every device holds whole over the axes that split the batch: "
        + ", ".join(list(whole)[:3]),
        _split(arrays, whole),
    )
    wide = [each for each in kept + temporary if dtype_of(each.life.shape) == "f32"]
    if wide:
        add(
            "bfloat16",
            f"hold in bfloat16 what {_where(wide)} and others make in float32",
            {each.life.buffer: 0.5 for each in wide},
        )
    gathered = [each for each in chosen("copy") if each.name.endswith("gathered")]
    if len(gathered) > 2:
        add(
            "gather later",
            "gather each weight where it is used, inside the loop over layers, and again in the "
            "backward pass",
            {each.life.buffer: 0.0 for each in gathered[1:]},
        )
    largest = max(temporary, key=lambda each: each.life.size, default=None)
    if largest:
        add(
            "blocks",
            f"compute {largest.name} {largest.life.shape.partition('{')[0]} "
            f"{_at(largest.origin)}in blocks, an eighth at a time: jax.lax.map or scan",
            {largest.life.buffer: 1 / 8},
        )
    return found


def dtype_of(shape: str) -> str:
    """Returns the dtype of a shape, as in "bf16"."""
    return shape.partition("[")[0].lstrip("(")


def _where(arrays: Sequence[_Array]) -> str:
    largest = max(arrays, key=lambda each: each.life.size)
    return str(largest.origin.line or largest.name)


def _at(origin: Origin) -> str:
    return f"({origin.line}) " if origin.line else ""


def _donated(
    arrays: Sequence[_Array], timeline: Timeline, origins: Origins
) -> tuple[str, dict[int, float]]:
    """Returns the results that could take the place of an argument of their shape."""
    places = collections.Counter(life.buffer for life in timeline.lives)
    free = [life for life in timeline.lives if life.is_argument and places[life.buffer] == 1]
    parts: dict[int, float] = {}
    names = []
    last = len(timeline.running) - 1
    for life in sorted(timeline.lives, key=lambda life: -life.size):
        if life.is_argument or life.end < last or life.buffer in parts:
            continue
        shape = life.shape.partition("{")[0]
        same = next((each for each in free if each.shape.partition("{")[0] == shape), None)
        if same:
            free.remove(same)
            parts[life.buffer] = 0.0
            names.append(origins.of(same.instruction).operation or same.instruction.name)
    first = re.split(r"[\[.]", names[0])[0] if names else ""
    return (
        f"let results take the places of arguments of their shapes, {first} first: "
        f'jax.jit(..., donate_argnames="{first}")',
        parts,
    )


def _split(arrays: Sequence[_Array], whole: Mapping[str, int]) -> dict[int, float]:
    """Returns what is left of arguments, their gradients and what the optimizer keeps of them."""
    parts: dict[int, float] = {}
    for name, number in whole.items():
        key = name[name.find("[") :] if "[" in name else name
        for each in arrays:
            own = each.role in ("argument", "gradient", "result")
            if own and (each.name.endswith(key) or each.name == f"gradient of {name}"):
                parts[each.life.buffer] = 1 / max(number, 1)
    return parts
