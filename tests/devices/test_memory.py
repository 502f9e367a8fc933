"""Bytes of arrays on devices, those of TPUs as their compiler says."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout

from neo_jax.devices import memory
from neo_jax.devices.memory import device_bytes, peak_memory, tiled_bytes, tree_bytes
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler

SHAPES = [
    (), (1,), (2,), (100,), (128,), (129,), (300,), (768,), (1024,), (1500,), (5000,),
    (1, 1), (2, 64), (3, 100), (4, 256), (5, 300), (7, 7), (8, 128), (9, 130), (17, 65),
    (768, 12, 64), (6, 12, 64, 768), (4, 2, 128), (3, 3, 3, 3), (4, 1), (1000, 2), (5, 1000, 4),
    (1, 64, 8, 1), (2, 3, 5, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "itemsize", "size"),
    [
        ((), 4, 512),
        ((768,), 4, 4096),  # 1024 floats
        ((768,), 2, 2048),
        ((3, 100), 4, 4 * 128 * 4),
        ((3, 100), 2, 4 * 128 * 2),
        ((9, 130), 4, 16 * 256 * 4),
        ((1000, 2), 4, 1024 * 2 * 4),  # lies on its side
        ((2048, 16, 128), 4, 2048 * 16 * 128 * 4),  # fills its tiles
    ],
)
def test_bytes_in_tiles(shape, itemsize, size):
    assert tiled_bytes(shape, itemsize) == size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_tiles_are_those_of_the_compiler(dtype):
    place = jax.sharding.SingleDeviceSharding(find_topology("v5e:1x1").devices[0])
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in SHAPES]
    program = jax.jit(lambda *arrays: sum(x.astype(jnp.float32).sum() for x in arrays))
    told = program.lower(*arrays).compile().memory_analysis().argument_size_in_bytes
    assert tree_bytes(arrays, tiled=True) == told


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0), (0, 1, 2)])
def test_an_order_that_was_asked_for_may_waste(order):
    place = jax.sharding.SingleDeviceSharding(find_topology("v5e:1x1").devices[0])
    shape = (768, 3, 64)
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=Format(Layout(order), place))
    told = jax.jit(lambda x: x.sum()).lower(array).compile().memory_analysis()
    assert device_bytes(array, tiled=True) == told.argument_size_in_bytes


def test_a_device_holds_its_part():
    sharding = make_sharding("fsdp=4,model=2", "embed:fsdp,mlp:model")
    leaf = jax.ShapeDtypeStruct(
        (8, 6), jnp.float32, sharding=sharding.named(("embed", "mlp"), (8, 6))
    )
    assert device_bytes(leaf, tiled=False) == 2 * 3 * 4
    assert device_bytes(jax.ShapeDtypeStruct((8, 6), jnp.bfloat16), tiled=False) == 96
    assert tree_bytes({"a": leaf, "b": [leaf]}, tiled=True) == 2 * 2 * 128 * 4


def test_the_memory_of_a_cpu_is_that_of_the_process():
    assert 1e8 < peak_memory() < 1e12


def test_the_memory_of_devices_is_that_of_the_fullest(monkeypatch):
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}]
    devices = [SimpleNamespace(memory_stats=lambda each=each: each) for each in stats]
    fake = SimpleNamespace(default_backend=lambda: "tpu", local_devices=lambda: devices)
    monkeypatch.setattr(memory, "jax", fake)
    assert peak_memory() == 5
    monkeypatch.setattr(devices[0], "memory_stats", lambda: None)
    assert math.isnan(peak_memory())
