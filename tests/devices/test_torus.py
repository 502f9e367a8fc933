"""Where devices lie in a mesh, and how a mesh axis is cut along the axes of a TPU's torus."""

import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from neo_jax.devices import torus
from neo_jax.devices.torus import along_torus, arrange
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding


def chips(*sizes):
    """Devices of a slice, as those of a TPU tell where they are."""
    places = itertools.product(*map(range, sizes))
    return [SimpleNamespace(coords=place, core_on_chip=0) for place in places]


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ({"data": 2, "fsdp": 4}, "data"),
        ({"fsdp": 4, "data": 2}, "data"),
        ({"data": 1, "fsdp": 4, "model": 2}, "fsdp"),
        ({"fsdp": 8}, "fsdp"),
    ],
)
def test_one_axis_lies_across_tpu_slices(sizes, outer):
    devices = [
        SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 4, device_kind="", platform="")
        for i in range(8)
    ]
    laid = arrange(sizes, devices)
    assert laid.shape == tuple(sizes.values())
    slices = np.vectorize(lambda device: device.slice_index)(laid)
    halves = np.split(slices, 2, axis=list(sizes).index(outer))
    assert [set(half.flat) for half in halves] == [{0}, {1}]
    with pytest.raises(NeoError, match="no axis of the mesh divides over 2 TPU slices; write"):
        arrange({"data": 1, "fsdp": 3}, devices[:2] + devices[4:5])


def test_one_long_axis_goes_along_the_torus():
    devices = chips(2, 4)
    laid = arrange({"fsdp": 8, "model": 1}, devices[::-1])
    assert laid.shape == (8, 1)
    assert laid.reshape(-1).tolist() == devices


@pytest.mark.parametrize(
    ("line", "sizes"),
    [
        (chips(4, 4, 1), (4, 4)),
        (chips(2, 2, 2), (2, 2, 2)),
        (chips(1, 8), (8,)),
        (chips(1, 1), (1,)),
        (chips(4, 4)[::2], (4, 2)),  # every other one
        (chips(4, 2)[:7], (7,)),
        ([*chips(2, 2), *chips(2, 2)[::-1]], (8,)),  # a winding line
        ([chips(2, 2)[i] for i in (0, 3, 1, 2)], (4,)),  # diagonal
        (jax.devices()[:4], (4,)),  # a CPU tells nothing
    ],
)
def test_axes_of_the_torus_along_a_line(line, sizes):
    assert torus._torus_sizes(line) == sizes


def test_a_mesh_is_cut_along_the_torus(monkeypatch):
    mesh = make_sharding("fsdp=4,model=2").mesh
    assert along_torus(mesh, ("fsdp",)) == (mesh, {"fsdp": ("fsdp",)})
    monkeypatch.setattr(torus, "_torus_sizes", lambda line: (2, len(line) // 2))
    cut, names = along_torus.__wrapped__(mesh, ("fsdp",))
    assert names == {"fsdp": ("fsdp0", "fsdp1")}
    assert dict(cut.shape) == {"fsdp0": 2, "fsdp1": 2, "model": 2}
    assert cut.devices.reshape(-1).tolist() == mesh.devices.reshape(-1).tolist()
