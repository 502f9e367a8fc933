"""What a compiled program sends between devices, read from its text.

`compiled.as_text()` is XLA's HLO: computations, each a list of instructions. Loops call a body a
number of times, fusions call a computation once, and a collective names the groups of devices that
take part in it. Devices are numbered along the mesh, its last axis fastest.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""The collectives, by XLA's names."""


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str  # of the result, as in "f32[4,8]{1,0}" or "(s32[], f32[4])"
    opcode: str
    operands: str
    attributes: str
    is_root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that the devices of a mesh do together, possibly many times."""

    kind: str  # of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group lie
    times: int
    wire_bytes: int  # that a device sends each time


class Traffic(NamedTuple):
    """All collectives of one kind along the same axes."""

    kind: str
    axes: tuple[str, ...]
    times: int  # that one of them runs
    wire_bytes: int  # that a device sends in all of them


def traffic(
    text: str, mesh_shape: Mapping[str, int], open_trips: int | None = None
) -> list[Traffic]:
    """Sums what `collectives` returns by kind and axes, the most bytes first."""
    rows: dict[tuple[str, tuple[str, ...]], Traffic] = {}
    for each in collectives(text, mesh_shape, open_trips):
        before = rows.get((each.kind, each.axes), Traffic(each.kind, each.axes, 0, 0))
        rows[each.kind, each.axes] = before._replace(
            times=before.times + each.times,
            wire_bytes=before.wire_bytes + each.times * each.wire_bytes,
        )
    return sorted(rows.values(), key=lambda row: -row.wire_bytes)


def collectives(
    text: str, mesh_shape: Mapping[str, int], open_trips: int | None = None
) -> list[Collective]:
    """Returns what devices do together in one run of a program.

    A device sends (n-1)/n of the whole tensor in an all-gather or a reduce-scatter among n devices,
    as rings of any direction do, and twice that in an all-reduce (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009); in a permutation or an
    all-to-all what leaves it. What a TPU's compiler writes as an all-reduce inside a fusion called
    all-reduce-scatter is a reduce-scatter; the links of a chain, which share a chain_id, are one
    collective that runs beside other work.

    Args:
      text: of the compiled program.
      mesh_shape: the size of each axis of the mesh, in order.
      open_trips: how often a loop runs whose end depends on data.

    Raises:
      ValueError: there is a collective in such a loop and `open_trips` is None.
    """
    return list(_Reader(text, mesh_shape, open_trips).run())


class _Reader:
    def __init__(self, text: str, mesh_shape: Mapping[str, int], open_trips: int | None):
        self._computations, self._entry = parse(text)
        self._mesh_shape = mesh_shape
        self._open_trips = open_trips

    def run(self) -> Iterator[Collective]:
        return self._walk(self._entry, 1, set(), scatter=False)

    def _walk(
        self, computation: str, times: int | None, chains: set[str], scatter: bool
    ) -> Iterator[Collective]:
        """Yields the collectives of a computation that runs `times` times, None if unknown.

        `chains` are those already seen in the computation that this one is fused into.
        """
        for instruction in self._computations[computation]:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                chain = re.search('chain_id="([^"]+)"', instruction.attributes)
                if chain and chain[1] in chains:
                    continue
                chains |= {chain[1]} if chain else set()
                yield self._collective(kind, instruction, times, scatter)
            elif instruction.opcode == "while":
                trips = self._trips(instruction)
                inside = None if times is None or trips is None else times * trips
                yield from self._walk(_called("body", instruction), inside, set(), False)
            elif instruction.opcode == "conditional":
                yield from self._branch(instruction, times)
            elif instruction.opcode in ("fusion", "call", "async-start"):
                name = _called("to_apply" if instruction.opcode == "call" else "calls", instruction)
                fused_scatter = scatter or name.startswith("all-reduce-scatter")
                yield from self._walk(name, times, chains, fused_scatter)

    def _branch(self, instruction: Instruction, times: int | None) -> Iterator[Collective]:
        """Yields the collectives of the branch that sends most."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = re.findall(
            r"[\w.-]+",
            listed[1]
            if listed
            else " ".join(_called(f"{which}_computation", instruction) for which in _BRANCHES),
        )
        branches = [list(self._walk(name, times, set(), False)) for name in names]
        yield from max(branches, key=lambda found: sum(c.times * c.wire_bytes for c in found))

    def _trips(self, loop: Instruction) -> int | None:
        """Returns how often a loop runs: as the text says, or as its condition counts from 0."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self._computations[_called("condition", loop)]
        root = next(instruction for instruction in condition if instruction.is_root)
        if root.opcode != "compare":
            return self._open_trips
        constants = {i.name: i.operands for i in condition if i.opcode == "constant"}
        limits = [constants[name] for name in _names(root.operands) if name in constants]
        return int(limits[0]) if limits else self._open_trips

    def _collective(
        self, kind: str, instruction: Instruction, times: int | None, scatter: bool
    ) -> Collective:
        if times is None:
            raise ValueError(f"{instruction.name} is in a loop of unknown length; set open_trips")
        shapes = _split_tuple(instruction.shape)
        if instruction.opcode in ("all-gather-start", "collective-permute-start"):
            shapes = shapes[1:2]  # the operand comes first
        size = sum(map(num_bytes, shapes))
        groups = _groups(instruction.attributes, math.prod(self._mesh_shape.values()))
        axes, among = self._axes(groups), groups.shape[1]
        if kind == "collective-permute":
            return Collective(kind, axes, times, size if axes else 0)
        if kind == "reduce-scatter":
            size *= among
        if kind == "all-reduce" and scatter:
            kind = "reduce-scatter"
        passes = 2 if kind == "all-reduce" else 1
        return Collective(kind, axes, times, passes * size * (among - 1) // among)

    def _axes(self, groups: np.ndarray) -> tuple[str, ...]:
        """Returns the mesh axes along which the devices of a group differ."""
        places = np.unravel_index(groups, tuple(self._mesh_shape.values()))
        return tuple(
            name
            for name, place in zip(self._mesh_shape, places, strict=True)
            if np.any(place != place[:, :1])
        )


_BRANCHES = ("true", "false")


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Returns the computations of a program by name, and the name of the one it starts with."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace():
            header = re.match(r"(ENTRY )?%?([\w.-]+) ", line)
            if header:
                lines = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif lines is not None:
            instruction = _instruction(line)
            if instruction:
                lines.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    return Instruction(head[2], shape, opcode, rest[1:end], rest[end + 1 :], bool(head[1]))


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one at the start."""
    depth = 0
    for match in re.finditer("[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _called(role: str, instruction: Instruction) -> str:
    called = re.search(rf"\b{role}=%?([\w.-]+)", instruction.attributes)
    assert called, f"{instruction.name} does not say its {role}"
    return called[1]


def _names(operands: str) -> list[str]:
    return re.findall(r"%?([\w.-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", operands))


def _split_tuple(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape; of another shape itself."""
    if not shape.startswith("("):
        return [shape]
    elements, depth, start = [], 0, 1
    for match in re.finditer(r"[(\[{]|[)\]}]|,", shape):
        if match[0] == ",":
            if depth == 1:
                elements.append(shape[start : match.start()])
                start = match.end()
        else:
            depth += 1 if match[0] in "([{" else -1
    return [*elements, shape[start:-1]]


def num_bytes(shape: str) -> int:
    """Returns the bytes of a shape's arrays, tiles and padding apart: 16 of "(f32[4], u32[])"."""
    bits = 0
    for dtype, sizes in re.findall(r"([a-z]+[0-9]*)\w*\[([0-9,<=]*)\]", shape):
        digits = re.sub("[a-z]", "", dtype)
        width = int(digits) if digits else 8 * (dtype == "pred")
        bits += width * math.prod(int(size.strip("<=")) for size in sizes.split(",") if size)
    return -(-bits // 8)


def _groups(attributes: str, num_devices: int) -> np.ndarray:
    """Returns the devices that a collective joins, a row a group; of a permutation its pairs."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    if pairs:
        return np.array(re.findall(r"(\d+),(\d+)", pairs[1]), int)
    text = attributes.partition("replica_groups=")[2]
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        sizes, _, devices = text.partition("<=")
        return _iota(devices).reshape(_numbers(sizes))
    listed = re.match(r"\{(\{.*?\})\}", text)
    if not listed:  # {}: all
        return np.arange(num_devices)[None]
    return np.array([_numbers(group) for group in re.findall(r"\{[^}]*\}", listed[1])])


def _mesh_groups(text: str) -> np.ndarray:
    """Reads "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}": groups along axes of a mesh.

    An axis may be a part of one: 'b':(2)2 is the second factor of 'b', behind one of 2.
    """
    match = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text)
    assert match, f"unknown replica groups: {text[:80]}"
    sizes = {name: int(size) for name, size in re.findall(r"([^\s,=]+)=(\d+)", match[1])}
    devices = _iota(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
    wanted = re.findall(r"([^\s,:]+?)(?::\((\d+)\)(\d+))?(?:,|$)", match[3])
    # Every axis in three factors: before, in and behind what the group spans.
    factors: list[int] = []
    spanned: list[int] = []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(bound for n, *cut in wanted if n == name for bound in _cut(cut))})
        for low, high in zip(cuts, cuts[1:] or cuts, strict=False):
            inside = any(n == name and _spans(cut, low) for n, *cut in wanted)
            spanned += [len(factors)] if inside else []
            factors.append(high // low)
    others = [axis for axis in range(len(factors)) if axis not in spanned]
    grid = devices.reshape(factors).transpose(*others, *spanned)
    return grid.reshape(-1, math.prod(factors[axis] for axis in spanned))


def _cut(cut: Sequence[str]) -> list[int]:
    return [int(cut[0]), int(cut[0]) * int(cut[1])] if cut[0] else []


def _spans(cut: Sequence[str], low: int) -> bool:
    return not cut[0] or int(cut[0]) <= low < int(cut[0]) * int(cut[1])


def _iota(text: str) -> np.ndarray:
    """Reads "[4,2]T(1,0)", the numbers from 0 transposed, or a list of them; returns them flat."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if not match:
        return np.array(_numbers(text))
    sizes = _numbers(match[1])
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose(_numbers(match[2])) if match[2] else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
