"""How well a run uses its devices: FLOPs and memory."""

import math
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.config import ModelConfig

# Peak dense bfloat16 FLOP/s of one JAX device, by its `device_kind`. Sources: Google Cloud's TPU
# system architecture pages and NVIDIA's data sheets. A TPU v2 or v3 chip is two devices.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "Tesla T4": 65e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def flops_per_token(config: ModelConfig, length: int, frozen: bool = False) -> float:
    """Returns the FLOPs that training needs for one token of a sequence of `length`.

    Six for each parameter that multiplies (Kaplan et al., 2020, section 2.1; the tied head once,
    learned positions never), or four where all are frozen and get no gradient; and 12 H N for each
    key that a query sees. Adapters are not counted.
    """
    weights = config.num_params - config.max_length * config.embed_dim
    keys = 0.0
    for layer in range(config.num_layers):
        window = min(config.window(layer) or length, length)
        keys += window * (window + 1) / 2 + (length - window) * window
    return (4 if frozen else 6) * weights + 12 * config.embed_dim * keys / length


def peak_flops(dtype: str) -> float:
    """Returns the FLOP/s that all devices of all hosts can reach; NaN where it is not known.

    A CPU's is measured: the rate of a matrix product, which takes some tenths of a second.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_flops(jnp.dtype(dtype)) * jax.process_count()
    return PEAK_FLOPS.get(device.device_kind, math.nan) * jax.device_count()


def _measured_flops(dtype: Any) -> float:
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


def peak_memory() -> float:
    """Returns the most bytes that a device of this process has held so far; NaN where unknown.

    A CPU's is the memory of the whole process.
    """
    if jax.default_backend() == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", math.nan) for each in stats)
