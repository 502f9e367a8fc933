"""How well a run uses its devices: FLOPs and memory."""

import math
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.config import ModelConfig
from neo_jax.devices.chips import chip


def flops_per_token(config: ModelConfig, length: int, frozen: bool = False) -> float:
    """Returns the FLOPs that training needs for one token of a sequence of `length`.

    Six for each parameter that multiplies (Kaplan et al., 2020, section 2.1; the tied head once,
    what is only looked up never), or four where all are frozen and get no gradient; and 12 H N for
    each key that a query sees. Adapters are not counted.
    """
    looked_up = config.max_length + (0 if config.tied_head else config.vocab_size)
    weights = config.num_params - looked_up * config.embed_dim
    keys = visible_keys(config, length) / length
    return (4 if frozen else 6) * weights + 12 * config.embed_dim * keys


def visible_keys(config: ModelConfig, length: int) -> float:
    """Returns the pairs of a query and a key that it sees, in a sequence, over all layers."""
    pairs = 0.0
    for layer in range(config.num_layers):
        window = min(config.window(layer) or length, length)
        pairs += window * (window + 1) / 2 + (length - window) * window
    return pairs


def peak_flops(dtype: str, num_devices: int) -> float:
    """Returns the FLOP/s that devices can reach together; NaN where it is not known.

    A CPU's is measured: the rate of a matrix product, which takes some tenths of a second. Devices
    of one process share that.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return _measured_flops(jnp.dtype(dtype)) * jax.process_count()
    return chip(device.device_kind).peak_flops * num_devices


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
