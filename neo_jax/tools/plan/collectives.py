"""What a compiled program sends between devices, by kind and mesh axes.

A collective names the groups of devices that take part in it. Devices are numbered along the mesh,
its last axis fastest.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from neo_jax.tools.plan.hlo import Run, elements, num_bytes, parse, runs

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""The collectives, by XLA's names."""

NO_SLICES: Mapping[str, int] = {}
"""Of a mesh in one TPU slice."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that the devices of a mesh do together, possibly many times."""

    kind: str  # of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group lie
    times: int
    wire_bytes: int  # that a device sends each time
    between_slices: bool = False  # by the network, and not from neighbour to neighbour


class Traffic(NamedTuple):
    """All collectives of one kind along the same axes."""

    kind: str
    axes: tuple[str, ...]
    times: int  # that one of them runs
    wire_bytes: int  # that a device sends in all of them
    between_slices: bool = False  # by the network, and not from neighbour to neighbour


def traffic(
    text: str,
    mesh_shape: Mapping[str, int],
    open_trips: int | None = None,
    slices: Mapping[str, int] = NO_SLICES,
) -> list[Traffic]:
    """Sums what `collectives` returns by kind and axes, the most bytes first."""
    rows: dict[tuple, Traffic] = {}
    for each in collectives(text, mesh_shape, open_trips, slices):
        key = each.kind, each.axes, each.between_slices
        before = rows.get(key, Traffic(each.kind, each.axes, 0, 0, each.between_slices))
        rows[key] = before._replace(
            times=before.times + each.times,
            wire_bytes=before.wire_bytes + each.times * each.wire_bytes,
        )
    return sorted(rows.values(), key=lambda row: -row.wire_bytes)


def collectives(
    text: str,
    mesh_shape: Mapping[str, int],
    open_trips: int | None = None,
    slices: Mapping[str, int] = NO_SLICES,
) -> list[Collective]:
    """Returns what devices do together in one run of a program.

    A device sends (n-1)/n of the whole tensor in an all-gather or a reduce-scatter among n devices,
    as rings of any direction do, and twice that in an all-reduce (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009); in a permutation or an
    all-to-all what leaves it. What a TPU's compiler writes as an all-reduce inside a fusion called
    all-reduce-scatter is a reduce-scatter; the links of a chain, which share a chain_id, are one
    collective that runs beside other work. The program of several slices is that of one of them,
    which sends to the others by its hosts.

    Args:
      text: of the compiled program.
      mesh_shape: the size of each axis of the mesh, in order.
      open_trips: how often a loop runs whose end depends on data.
      slices: the axes that lead to other TPU slices, and to how many.

    Raises:
      ValueError: there is a collective in such a loop and `open_trips` is None.
    """
    found = []
    chains = set()
    inside = {name: size // slices.get(name, 1) for name, size in mesh_shape.items()}
    for run in runs(parse(text), open_trips):
        attributes = run.instruction.attributes
        if run.instruction.opcode == "send" and "_xla_megascale_transfer_type" in attributes:
            found.append(_between_slices(run, slices))
        if run.instruction.opcode.removesuffix("-start") not in KINDS:
            continue
        chain = re.search('chain_id="([^"]+)"', attributes)
        if chain and (run.path, chain[1]) in chains:
            continue
        if chain:
            chains.add((run.path, chain[1]))
        found.append(_collective(run, inside))
    return found


def _between_slices(run: Run, slices: Mapping[str, int]) -> Collective:
    told = re.search('transfer_type="([A-Z_]+)"', run.instruction.attributes)
    assert told
    kind, among = told[1].lower().replace("_", "-"), math.prod(slices.values())
    size = num_bytes(elements(run.instruction.shape)[0])  # of what a device gives to its host
    sent = {
        "all-reduce": 2 * size * (among - 1) // among,
        "reduce-scatter": size * (among - 1) // among,
        "all-gather": size * (among - 1),
    }.get(kind, size)
    return Collective(kind, tuple(slices), _times(run), sent, between_slices=True)


def _times(run: Run) -> int:
    if run.times is None:
        raise ValueError(f"{run.instruction.name} is in a loop of unknown length; set open_trips")
    return run.times


def _collective(run: Run, mesh_shape: Mapping[str, int]) -> Collective:
    instruction = run.instruction
    times = _times(run)
    kind = instruction.opcode.removesuffix("-start")
    shapes = elements(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        shapes = shapes[1:2]  # the operand comes first
    size = sum(map(num_bytes, shapes))
    groups = _groups(instruction.attributes, math.prod(mesh_shape.values()))
    axes, among = _axes(groups, mesh_shape), groups.shape[1]
    if kind == "collective-permute":
        return Collective(kind, axes, times, size if axes else 0)
    if kind == "reduce-scatter":
        size *= among
    if any(name.startswith("all-reduce-scatter") for name in run.fusions):
        kind = "reduce-scatter"
    passes = 2 if kind == "all-reduce" else 1
    return Collective(kind, axes, times, passes * size * (among - 1) // among)


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    places = np.unravel_index(groups, tuple(mesh_shape.values()))
    return tuple(
        name
        for name, place in zip(mesh_shape, places, strict=True)
        if np.any(place != place[:, :1])
    )


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
