"""What the devices at hand can do, for rooms that are to work alike on all of them."""

import functools
import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.devices.chips import BFLOAT16_CAPABILITY, chip, compute_capability
from neo_jax.files.streams import muted


@functools.cache
def start() -> None:
    """Lets JAX find its devices, without what libtpu prints where it finds no TPU."""
    with muted():
        jax.devices()


def fast_dtype() -> np.dtype:
    """Returns the dtype in which the devices of this process multiply fastest without loss."""
    if jax.default_backend() == "cpu":
        return jnp.dtype(jnp.float32)
    is_old = any(compute_capability(device) < BFLOAT16_CAPABILITY for device in jax.devices())
    return jnp.dtype(jnp.float16 if is_old else jnp.bfloat16)


def fast_cache_dtype(device: jax.Device | None = None) -> np.dtype | None:
    """Returns the dtype of keys and values that a device reads fastest, by default of those here.

    None stands for that of products. CPUs attend in float32, and would convert what is not.
    """
    platform = device.platform if device else jax.default_backend()
    return jnp.dtype(jnp.float32) if platform == "cpu" else None


def identity(device: jax.Device) -> tuple[str, str]:
    """Returns what differs between devices that may compute other numbers."""
    return device.platform, device.device_kind


def peak_flops(dtype: str, num_devices: int) -> float:
    """Returns the FLOP/s that devices can reach together; NaN where it is not known.

    A CPU's is measured: the rate of a matrix product, which takes some tenths of a second. Devices
    of one process share that.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_flops(jnp.dtype(dtype)) * jax.process_count()
    return chip(device.device_kind).peak_flops * num_devices


def _measured_flops(dtype: np.dtype) -> float:
    size = 1024
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    product(x).block_until_ready()
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
