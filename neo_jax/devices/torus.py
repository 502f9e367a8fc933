"""How a mesh is laid over the hardware: a TPU slice is a torus, slices are joined by a network."""

import collections
import functools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from neo_jax.errors import NeoError


def arrange(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices as an array over the mesh, neighbours where the hardware has them.

    One axis spans the slices: `data`, which communicates least, or the first that they divide.

    Raises:
      NeoError: no axis divides over the slices.
    """
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    if len(slices) == 1:
        return _arrange_slice(tuple(sizes.values()), devices)
    for outer in sorted(sizes, key=lambda name: name != "data"):
        if sizes[outer] % len(slices) == 0:
            within = {**sizes, outer: sizes[outer] // len(slices)}
            parts = [_arrange_slice(tuple(within.values()), part) for part in slices.values()]
            return np.concatenate(parts, axis=list(sizes).index(outer))
    raise NeoError(
        f"no axis of the mesh divides over {len(slices)} TPU slices; write for example "
        f"--mesh data={len(slices)},fsdp=-1."
    )


def _arrange_slice(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    if max(shape) == len(devices) and hasattr(devices[0], "coords"):
        # Along each axis of the torus in turn, not in the ring that mesh_utils winds through it.
        return np.array(sorted(devices, key=_coordinates)).reshape(shape)
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


@functools.lru_cache
def along_torus(mesh: Mesh, names: tuple[str, ...]) -> tuple[Mesh, dict[str, tuple[str, ...]]]:
    """Cuts mesh axes that span several axes of a torus into one for each.

    A sum over the devices of such an axis that leaves each a part moves half as much when it goes
    along the torus' axes in turn: across several at once TPUs give the whole sum to all.

    Returns:
      A mesh of the same devices in the same order, and what each of the named axes became.
    """
    sizes: dict[str, int] = {}
    cut: dict[str, tuple[str, ...]] = {}
    for axis, name in enumerate(mesh.axis_names):
        line = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.devices.shape[axis])[0]
        parts = _torus_sizes(list(line)) if name in names else (len(line),)
        cut[name] = tuple(f"{name}{i}" for i in range(len(parts))) if parts[1:] else (name,)
        sizes |= dict(zip(cut[name], parts, strict=True))
    devices = mesh.devices.reshape(tuple(sizes.values()))
    auto = (AxisType.Auto,) * len(sizes)
    return Mesh(devices, tuple(sizes), axis_types=auto), {name: cut[name] for name in names}


def _torus_sizes(line: Sequence[jax.Device]) -> tuple[int, ...]:
    """Returns how many devices of a line are along each axis of the torus, the last one fastest."""
    if len(line) == 1 or not hasattr(line[0], "coords"):
        return (len(line),)
    places = np.array([_coordinates(device) for device in line])
    moved = places != places[0]
    leaves_run = moved[:, ~moved[1]].any(axis=1)  # the second device shows its axis
    run = int(leaves_run.argmax()) or len(line)
    if len(line) % run or run in (1, len(line)):
        return (len(line),)
    runs = places.reshape(-1, run, places.shape[1])
    if np.any(runs - runs[:, :1] != runs[0] - runs[0, 0]):
        return (len(line),)
    return (*_torus_sizes(line[::run]), run)


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    return (*device.coords, getattr(device, "core_on_chip", 0))
