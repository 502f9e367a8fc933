"""What the devices at hand can do, measured: the rate of products, and of reading memory.

Each figure is of all devices together, at work at once, and the best that any shape reaches in any
of several repeats: what noise, cold caches or an unlucky shape take off is not a limit.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

DTYPES = ("float32", "bfloat16")

_REPEATS = 5
_IN_A_ROW = 0.02  # seconds of calls that are queued at once, so that starting them costs nothing
_MOST_IN_A_ROW = 50
_LONG_ENOUGH = 0.05  # seconds of a product, beyond which a larger one would be no faster
_SIZES = (1024, 2048, 4096, 8192, 16384)
_COLUMNS = (1024, 4096)

READ_BYTES = 2**30
"""What is read at a time to measure memory: several times the largest caches."""

Programs = Sequence[Callable[[], Any]]  # one for each device


@dataclasses.dataclass(frozen=True)
class Limits:
    """What all devices together reach."""

    products: dict[str, float]  # FLOP/s by dtype; float32 without any rounding of operands
    product_shapes: dict[str, str]  # what reached it, "2048 x 2048 x 2048"
    bandwidth: float  # bytes a second, reading
    reading: str  # what reached it


def measure_limits(devices: Sequence[jax.Device], read_bytes: int = 0) -> Limits:
    """Measures devices of this process, which work at once; takes some seconds.

    Each reads an array of so many bytes, of a CPU its share of one such; 0 is `READ_BYTES`.
    """
    read_bytes = read_bytes or READ_BYTES
    if devices[0].platform == "cpu":
        read_bytes //= len(devices)
    rates, shapes = {}, {}
    for dtype in DTYPES:
        rates[dtype], shapes[dtype] = _products(devices, dtype)
    return Limits(rates, shapes, *_bandwidth(devices, read_bytes))


def _products(devices: Sequence[jax.Device], dtype: str) -> tuple[float, str]:
    """Returns the best rate of square products, and the shape that reached it.

    Sizes grow until one takes long enough for its start and its edges not to count.
    """
    found = (0.0, "")
    for size in _SIZES:
        x = jnp.ones((size, size), dtype)
        seconds = _best_seconds(_on_each(devices, _product, x, x))
        rate = len(devices) * 2 * size**3 / seconds
        found = max(found, (rate, f"{size} x {size} x {size}"))
        if seconds > _LONG_ENOUGH:
            break
    return found


@jax.jit
def _product(x: Any, y: Any) -> Any:
    # As `neo_jax.model.layers.einsum` multiplies: exact operands, sums in float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, y, precision=precision, preferred_element_type=jnp.float32)


def _bandwidth(devices: Sequence[jax.Device], read_bytes: int) -> tuple[float, str]:
    """Returns the best rate of reading a float32 array once, and what reached it.

    Which program reads as fast as the memory gives depends on the device's compiler.
    """
    found = (0.0, "")
    for columns in _COLUMNS:
        x = jnp.ones((read_bytes // 4 // columns, columns), jnp.float32)
        for name, (read, vectors) in _READERS.items():
            y = jnp.ones((columns, vectors), jnp.float32)
            seconds = _best_seconds(_on_each(devices, read, x, y))
            rate = len(devices) * x.nbytes / seconds
            found = max(found, (rate, f"{name} of {x.shape[0]} x {columns}"))
    return found


@jax.jit
def _sums(x: Any, y: Any) -> Any:
    return jnp.sum(x, axis=1)


_READERS = {
    "sums": (_sums, 1),
    "product with a vector": (_product, 1),
    "product with 8 vectors": (_product, 8),
}


def _on_each(devices: Sequence[jax.Device], function: Any, *arrays: Any) -> Programs:
    placed = [jax.device_put(arrays, device) for device in devices]
    return [functools.partial(function, *each) for each in placed]


def _best_seconds(programs: Programs) -> float:
    """Returns the least time in which all devices ran their program, at once.

    A short program is queued several times: a GPU reads a gigabyte in the time of a few starts.
    """

    def run(times: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready([program() for _ in range(times) for program in programs])
        return (time.perf_counter() - start) / times

    run(1)  # compiles
    times = min(_MOST_IN_A_ROW, math.ceil(_IN_A_ROW / run(1)))
    return min(run(times) for _ in range(_REPEATS))
