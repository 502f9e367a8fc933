"""What would avoid a collective, or make it smaller: a rule a function."""

import collections
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.dataflow import Flow, Source, Value, dtype
from neo_jax.tools.plan.hlo import Instruction, Run, elements, num_bytes, sizes
from neo_jax.tools.plan.origin import Frame, Origin, Origins


class Finding(NamedTuple):
    """A change to the source that would send less."""

    rule: str  # the name of the function of this module that found it
    text: str  # what to change
    saved: int  # bytes that a device need not send, all times together
    line: Frame | None = None  # where to change it, if that is another than the collective's


class Case(NamedTuple):
    """A tensor that is moved, and where it comes from."""

    flow: Flow
    origins: Origins
    run: Run
    traffic: Traffic
    value: Value  # before
    result: Value  # after
    source: Source  # where the tensor was made
    updated: Instruction | None  # the argument of which it is the gradient
    origin: Origin  # of the collective
    mesh_shape: Mapping[str, int]

    @property
    def made(self) -> Origin:
        """Of the tensor."""
        return self.origins.of(self.source.instruction)

    @property
    def primitive(self) -> str:
        """The operation that the compiler says the collective is of."""
        return self.origins.of(self.flow.instruction(self.result)).primitive

    @property
    def written(self) -> bool:
        """Whether the source says that it is to be moved, in shard_map."""
        return self.primitive in ("all_gather", "all_to_all", "ppermute", "pbroadcast")

    @property
    def axes(self) -> str:
        """Of the mesh, in words."""
        return "+".join(self.traffic.axes)

    @property
    def among(self) -> int:
        """How many devices exchange it."""
        return math.prod(self.mesh_shape[axis] for axis in self.traffic.axes)


def find(case: Case) -> list[Finding]:
    """Returns what would avoid a collective; nothing where the strategy needs it."""
    if not case.traffic.wire_bytes:
        return []
    found = [finding for rule in RULES for finding in rule(case)]
    taken = {finding.rule for finding in found}
    return [each for each in found if not (each.rule == "constraint" and len(taken) > 1)]


_BITS = {"f64": 64, "f32": 32, "bf16": 16, "f16": 16, "f8": 8, "s8": 8}


def _bits(instruction: Instruction) -> int:
    name = dtype(instruction)
    return _BITS.get("f8" if name.startswith("f8") else name, 0)


def narrower(case: Case) -> Iterator[Finding]:
    """A tensor is moved in a wide dtype, and a narrow one would do."""
    moved = case.flow.instruction(case.value)
    wide = _bits(moved)
    cast = next((each for each in case.source.passed if each.opcode == "convert"), None)
    given = case.flow.cast_from(cast) if cast else moved
    passed = [passed for _, _, passed in case.flow.uses(case.result)]
    narrow = min(wide, _bits(given), _bits(cast) if cast else wide)
    # A CPU's compiler widens what is moved, and rounds it again afterwards.
    rounded = all(any(_bits(each) <= narrow for each in _casts(path)) for path in passed)
    if cast and _bits(given) < _bits(cast) and not rounded:
        line = case.origins.of(cast).line
        yield Finding(
            "narrower",
            f"was widened from {dtype(given)} to {dtype(cast)} before it moves"
            f"{_at(line)}: cast after it has moved",
            case.traffic.wire_bytes * (wide - narrow) // wide,
            line,
        )
        return
    users = [[each for each in _casts(path) if _is_users(case, each)] for path in passed]
    if users and all(users):
        widest = max((min(casts, key=_bits) for casts in users), key=_bits)
        if 0 < _bits(widest) < narrow:
            yield Finding(
                "narrower",
                f"moves {dtype(moved)} that is rounded to {dtype(widest)} afterwards"
                f"{_at(case.origins.of(widest).line)}: cast before it moves",
                case.traffic.wire_bytes * (wide - _bits(widest)) // wide,
                case.origins.of(widest).line,
            )


def _casts(passed: tuple[Instruction, ...]) -> list[Instruction]:
    return [each for each in passed if each.opcode == "convert"]


def _at(line: Frame | None) -> str:
    return f" ({line})" if line else ""


def _is_users(case: Case, cast: Instruction) -> bool:
    """Whether it is a cast that the source asks for; a CPU's compiler has its own."""
    return case.origins.of(cast).primitive == "convert_element_type"


def every_trip(case: Case) -> Iterator[Finding]:
    """What is the same in each trip of a loop, or added up over the trips, is moved in each."""
    times = case.traffic.times
    if times < 2 or len(case.run.path) < 2:
        return
    saved = case.traffic.wire_bytes * (times - 1) // times
    if any(body in case.source.fixed_in for body in case.run.path[1:]):
        text = f"is the same all {times} times: move it once, before the loop, if memory allows"
        yield Finding("every_trip", text, saved)
    elif case.traffic.kind in ("all-reduce", "reduce-scatter") and case.flow.is_added(case.result):
        text = (
            f"is summed over {case.axes} in each of {times} trips and then added up: add up what "
            "each device has, and sum that once, after the loop, if memory allows"
        )
        yield Finding("every_trip", text, saved)


_LITTLE = 2**16  # bytes of a parameter, as of an adapter, that may as well be everywhere


def whole(case: Case) -> Iterator[Finding]:
    """A parameter that every device holds whole has a gradient that every device sums whole."""
    if case.updated is None or case.traffic.kind != "all-reduce":
        return
    if num_bytes(case.updated.shape) < _LITTLE:
        return
    name = case.origins.of(case.updated).operation
    shape = sizes(elements(case.updated.shape)[0])
    reduced = [size for size in sizes(case.flow.element_shape(case.result)) if size > 1]
    if len(reduced) < 2 or collections.Counter(reduced) - collections.Counter(shape):
        return  # small, or a parameter that is split, of which each device takes its part
    divides = [size for size in shape if size % case.among == 0]
    saved = case.traffic.wire_bytes // 2
    if divides:
        yield Finding(
            "whole",
            f"every device along {case.axes} holds all of {name}: split its axis of {max(divides)} "
            f"over {case.axes}, and each sums a part of the gradient and holds 1/{case.among}",
            saved,
        )
        return
    odd = max(shape)
    yield Finding("indivisible", f"{name} {_dims(shape)} " + _pad(odd, case), saved)


def _pad(size: int, case: Case) -> str:
    padded = -(-size // case.among) * case.among
    return (
        f"cannot be split: {size} does not divide by {case.axes}={case.among}; pad that axis to "
        f"{padded}, then split it"
    )


def _dims(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def padded(case: Case) -> Iterator[Finding]:
    """An axis that does not divide was padded to be split, and what was padded is cut off again."""
    axis = _gathered_axis(case)
    if axis is None:
        return
    full = sizes(case.flow.element_shape(case.result))
    for _, user, _ in case.flow.uses(case.result):
        cut = sizes(user.shape) if user.opcode == "slice" else full
        if len(cut) == len(full) and 0 < full[axis] - cut[axis] < case.among:
            text = f"an axis of {cut[axis]} {_pad(cut[axis], case)}"
            first = _first_of(case, -(-cut[axis] // case.among))
            yield Finding("indivisible", text, case.traffic.wire_bytes, first)
            return


def _gathered_axis(case: Case) -> int | None:
    """Returns the axis along which an all-gather puts parts together."""
    found = re.search(r"dimensions=\{(\d+)\}", case.run.instruction.attributes)
    return int(found[1]) if case.traffic.kind == "all-gather" and found else None


def _first_of(case: Case, size: int) -> Frame | None:
    """Returns the line of the first result that has an axis of a size."""
    for each in case.flow.program.computations[case.flow.program.entry].values():
        if each.opcode != "parameter" and size in sizes(elements(each.shape)[0]):
            line = case.origins.of(each).line
            if line:
                return line
    return None


_ALONG = {
    "sort": "sorting", "top_k": "the largest entries", "cumsum": "a running sum",
    "cumlogsumexp": "a running sum", "cummax": "a running maximum", "cumprod": "a running product",
    "concatenate": "joining", "rev": "reversing", "reshape": "a new shape", "split": "cutting",
    "slice": "cutting", "dynamic_slice": "cutting", "dynamic_update_slice": "writing",
    "pad": "padding", "roll": "rolling", "gather": "a look-up", "scatter": "writing",
    "scatter-add": "adding to rows", "fft": "a Fourier transform", "cholesky": "a factorisation",
    "conv_general_dilated": "a convolution", "argsort": "sorting", "take": "a look-up",
}  # fmt: skip
_LOOKUPS = ("gather", "take")


def along(case: Case) -> Iterator[Finding]:
    """An operation needs all of an axis that is split."""
    name, line = _along(case)
    if not name or case.written:
        return
    if name == "reshape":
        text = (
            f"a new shape merges or cuts an axis that is split over {case.axes}, not into whole "
            "parts: choose sizes that divide, the one that is split first, or constrain the result"
        )
    elif name in _LOOKUPS:
        text = (
            f"a look-up in a table whose rows are split over {case.axes}: split its other axis, or "
            "look up in each part and sum the rows"
        )
    else:
        text = (
            f"{_ALONG[name]} ({name}) along an axis that is split over {case.axes}: leave that "
            "axis whole there, or split another"
        )
    yield Finding("along", text, case.traffic.wire_bytes, line)


def _along(case: Case) -> tuple[str, Frame | None]:
    """Returns the operation that needs all of an axis, if there is one, and its line."""
    if _is_cut(case):
        return "reshape", None
    sums = case.traffic.kind in ("all-reduce", "reduce-scatter")
    known = _LOOKUPS if sums else _ALONG  # a look-up in each part is summed
    uses = [case.origins.of(user) for _, user, _ in case.flow.uses(case.result)[:4]]
    for origin in (case.origin, *(() if sums else uses)):
        for part in origin.operation.split("/")[::-1][:3]:
            name = part.removeprefix("jit(").removesuffix(")").lstrip("_")
            if name in known:
                return name, origin.line
    return "", None


def _is_cut(case: Case) -> bool:
    """Whether what was gathered takes on another shape, in which the gathered axis is not."""
    axis = _gathered_axis(case)
    whole = sizes(case.flow.element_shape(case.result))
    if axis is None or sum(size > 1 for size in whole) < 2:
        return False
    shapes = [
        sizes(each.shape)
        for _, _, passed in case.flow.uses(case.result)
        for each in passed
        if each.opcode in ("bitcast", "reshape")
    ]
    return any(whole[axis] not in shape for shape in shapes)


def constraint(case: Case) -> Iterator[Finding]:
    """An activation is laid out anew, since two lines ask for different places."""
    if case.traffic.kind not in ("all-gather", "all-to-all", "collective-permute"):
        return
    if case.written or (case.source.is_argument and case.traffic.kind == "all-gather"):
        return
    if not case.origin.frames and not case.made.frames:  # the compiler's own
        return
    made = case.made.line
    here = f" (made at {made})" if made and made != case.origin.line else ""
    what = case.made.operation or "this"
    yield Finding(
        "constraint",
        f"{what}{here} is split in another way than is asked for here: constrain both alike, "
        "jax.lax.with_sharding_constraint, or leave this one out",
        case.traffic.wire_bytes,
        None if case.primitive == "sharding_constraint" else made,
    )


RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    narrower, every_trip, whole, padded, along, constraint,
)  # fmt: skip
"""Each finds one mistake."""
