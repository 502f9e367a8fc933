"""What a compiled program sends between devices, by kind and mesh axes.

A collective names the groups of devices that take part in it. Devices are numbered along the mesh,
its last axis fastest.
"""

import math
import re
import types
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from neo_jax.tools.plan.hlo import Program, Run, elements, num_bytes, runs

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
"""The collectives, by XLA's names."""


class Traffic(NamedTuple):
    """One collective, or all of one kind along the same axes."""

    kind: str  # of KINDS
    axes: tuple[str, ...]  # of the mesh, along which the devices of a group differ
    times: int  # that it runs
    wire_bytes: int  # that a device sends, all times together
    between_slices: bool = False  # by the network, and not from neighbour to neighbour
    links: float = 2.0  # by which a device sends at a time: both directions of a ring


def traffic(
    program: Program,
    mesh_shape: Mapping[str, int],
    open_trips: int | None = None,
    slices: Mapping[str, int] = types.MappingProxyType({}),
) -> list[Traffic]:
    """Sums what `collectives` returns by kind and axes, the most bytes first."""
    rows: dict[tuple, Traffic] = {}
    for each in collectives(program, mesh_shape, open_trips, slices):
        key = each.kind, each.axes, each.between_slices
        before = rows.get(key, each._replace(times=0, wire_bytes=0))
        rows[key] = each._replace(
            times=before.times + each.times, wire_bytes=before.wire_bytes + each.wire_bytes
        )
    return sorted(rows.values(), key=lambda row: -row.wire_bytes)


def collectives(
    program: Program,
    mesh_shape: Mapping[str, int],
    open_trips: int | None = None,
    slices: Mapping[str, int] = types.MappingProxyType({}),
) -> list[Traffic]:
    """Returns what devices do together in one run of a program, a row for each instruction.

    A device sends (n-1)/n of the whole tensor in an all-gather or a reduce-scatter among n devices,
    as rings of any direction do, and twice that in an all-reduce (Patarasuk and Yuan, "Bandwidth
    optimal all-reduce algorithms for clusters of workstations", 2009); in a permutation or an
    all-to-all what leaves it. What a TPU's compiler writes as an all-reduce inside a fusion called
    all-reduce-scatter is a reduce-scatter; the links of a chain, which share a chain_id, are one
    collective that runs next to other work. The program of several slices is that of one of them,
    which sends to the others by its hosts.

    `open_trips` is how often a loop runs whose end depends on data; there is a `ValueError` where
    that is needed and None. `slices` are the axes that lead to other TPU slices, and to how many.
    """
    return [row for _, row in located(program, mesh_shape, open_trips, slices)]


def located(
    program: Program,
    mesh_shape: Mapping[str, int],
    open_trips: int | None = None,
    slices: Mapping[str, int] = types.MappingProxyType({}),
) -> list[tuple[Run, Traffic]]:
    """Returns what `collectives` does, each row with the instruction that it is of."""
    found: list[tuple[Run, Traffic]] = []
    chains = set()
    inside = {name: size // slices.get(name, 1) for name, size in mesh_shape.items()}
    for run in runs(program, open_trips):
        opcode, attributes = run.instruction.opcode, run.instruction.attributes
        if opcode == "send" and "_xla_megascale_transfer_type" in attributes:
            found.append((run, _between_slices(run, slices)))
        if opcode.removesuffix("-start") not in KINDS:
            continue
        chain = re.search('chain_id="([^"]+)"', attributes)
        if not chain or (run.path, chain[1]) not in chains:
            found.append((run, _collective(run, inside)))
        if chain:
            chains.add((run.path, chain[1]))
    return found


def _between_slices(run: Run, slices: Mapping[str, int]) -> Traffic:
    kind = run.instruction.attribute('transfer_type="([A-Z_]+)"').lower().replace("_", "-")
    among, times = math.prod(slices.values()), run.known_times
    size = num_bytes(elements(run.instruction.shape)[0])  # of what a device gives to its host
    sent = {
        "all-reduce": 2 * size * (among - 1) // among,
        "reduce-scatter": size * (among - 1) // among,
        "all-gather": size * (among - 1),
    }.get(kind, size)
    return Traffic(kind, tuple(slices), times, times * sent, between_slices=True)


def _collective(run: Run, mesh_shape: Mapping[str, int]) -> Traffic:
    instruction, times = run.instruction, run.known_times
    kind, shapes = instruction.opcode.removesuffix("-start"), elements(instruction.shape)
    if instruction.opcode in ("all-gather-start", "collective-permute-start"):
        shapes = shapes[1:2]  # the operand comes first
    size = sum(map(num_bytes, shapes))
    groups = _groups(instruction.attributes, math.prod(mesh_shape.values()))
    axes, among = _axes(groups, mesh_shape), groups.shape[1]
    if kind == "collective-permute":
        return Traffic(kind, axes, times, times * size if axes else 0)
    if kind == "reduce-scatter":
        size *= among
    if any(name.startswith("all-reduce-scatter") for name in run.fusions):
        kind = "reduce-scatter"
    passes = 2 if kind == "all-reduce" else 1
    return Traffic(kind, axes, times, times * (passes * size * (among - 1) // among))


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

    An axis may be a part of one: 'b':(2)2 is the second factor of 'b', after one of 2.
    """
    match = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text)
    assert match, f"unknown replica groups: {text[:80]}"
    sizes = {name: int(size) for name, size in re.findall(r"([^\s,=]+)=(\d+)", match[1])}
    devices = _iota(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
    grid = np.unravel_index(np.arange(devices.size), tuple(sizes.values()))
    places = dict(zip(sizes, grid, strict=True))
    members = 1  # of a group; what they have in common is left of the places
    for name, before, part in re.findall(r"([^\s,:]+?)(?::\((\d+)\)(\d+))?(?:,|$)", match[3]):
        size = int(part or sizes[name])
        step = sizes[name] // (int(before or 1) * size)
        places[name] = places[name] - places[name] // step % size * step
        members *= size
    common = np.ravel_multi_index(tuple(places.values()), tuple(sizes.values()))
    return devices[np.argsort(common, kind="stable")].reshape(-1, members)


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
