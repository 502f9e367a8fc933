"""checkpoints/host_device.py: where copies lie in memory. What they hold: test_open_model.py."""

import jax
import ml_dtypes
import numpy as np
import pytest

from neo_jax.checkpoints.host_device import copy, shard


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (40, 33), (3, 5, 64), (0, 4)])
def test_cpu_devices_take_a_copy_as_it_is(shape, dtype):
    """Without a second copy, at whatever address the first would have begun."""
    view = np.arange(np.prod(shape), dtype=np.float64).reshape(shape).astype(np.float32)
    for _ in range(5):
        made = copy(view, np.dtype(dtype), shape)
        placed = jax.device_put(made, jax.devices("cpu")[0])
        np.testing.assert_array_equal(placed, view.astype(dtype))
        assert not made.size or placed.unsafe_buffer_pointer() == made.ctypes.data


def test_a_donated_copy_that_devices_share_is_not_written_over():
    """Every device has the same memory, and a step that consumes it none of the others' results."""
    places = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("data",)), jax.sharding.PartitionSpec()
    )
    view = np.arange(1000, dtype=np.float32)
    placed = shard(view, view.dtype, view.shape, places)
    twice = jax.jit(lambda x: 2 * x, donate_argnums=0)(placed)
    for part in twice.addressable_shards:
        np.testing.assert_array_equal(part.data, 2 * np.arange(1000))
    assert placed.is_deleted()
