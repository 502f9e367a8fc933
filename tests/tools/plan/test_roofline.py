"""The least time of a step, by hand."""

import math

import jax
import pytest

from neo_jax.devices.chips import UNKNOWN, Chip
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.hlo_cost import Work
from neo_jax.tools.plan.plan import roofline, slices_of, utilisation
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler

CHIP = Chip(peak_flops=100, memory=1000, memory_bandwidth=50, link_bandwidth=5, network_bandwidth=1)


def test_the_slowest_decides():
    traffic = [
        Traffic("all-gather", ("fsdp",), 3, 20),
        Traffic("all-reduce", ("model",), 1, 10),
        Traffic("all-reduce", ("data",), 1, 2, between_slices=True),
    ]
    roof = roofline(CHIP, Work(flops=400, memory_bytes=50), traffic)
    assert (roof.products, roof.memory, roof.interconnect, roof.network) == (4, 1, 3, 2)
    assert roof.step == 4
    assert roof.slowest == "products"
    assert utilisation(CHIP, roof, 300) == 0.75


def test_what_is_not_known_stays_so():
    roof = roofline(UNKNOWN, Work(400, 50), [Traffic("all-gather", ("fsdp",), 1, 20)])
    assert math.isnan(roof.step)
    assert roof.network == 0


@pytest.mark.parametrize(
    ("topology", "mesh", "slices"),
    [
        ("v5e:4x4", "data=4,fsdp=4", {}),
        ("2*v5e:4x4", "data=4,fsdp=8", {"data": 2}),
        ("2*v5e:2x2", "fsdp=8", {"fsdp": 2}),
    ],
)
def test_slices_along_axes(topology, mesh, slices):
    sharding = make_sharding(mesh, "", find_topology(topology).devices)
    assert isinstance(sharding.mesh, jax.sharding.Mesh)
    assert slices_of(sharding.mesh) == slices
