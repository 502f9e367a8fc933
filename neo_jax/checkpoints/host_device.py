"""Arrays on their way between files and devices: cast, padded, transposed, one at a time."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from neo_jax.axes import Array
from neo_jax.checkpoints.formats import FLOATS
from neo_jax.devices import processes
from neo_jax.errors import NeoError, suggest

_ALIGNMENT = 64  # bytes
_BLOCK_BYTES = 512 << 10  # of a transposition: what the cache of a core holds


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the numpy dtype that JAX will use for `dtype`."""
    try:
        named = np.dtype(dtype)
    except TypeError:
        named = None
    if named is None or named.name not in FLOATS:
        raise NeoError(f"{dtype!r} is no floating-point type.{suggest(str(dtype), FLOATS)}")
    return jax.dtypes.canonicalize_dtype(named)


def copy(view: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], finite: str = "") -> np.ndarray:
    """Returns a contiguous copy, filled up with zeros to `shape`.

    numpy transposes a large matrix with a cache miss for every element; block by block along the
    outermost axis of what is stored, where a block fits the cache, it is about five times as fast.
    A memory map is read in order.

    Args:
      view: what is copied.
      dtype: of the copy.
      shape: of the copy.
      finite: names what must be finite in the copy; nothing must where it is empty.

    Raises:
      NeoError: an entry is NaN or infinite, or becomes infinite in this dtype.
    """
    whole = _empty(shape, dtype)
    out, padding = np.split(whole, [len(view)])  # only the vocabulary, a first axis, has any
    padding[:] = 0
    for block in _blocks(view):
        with np.errstate(over="ignore", invalid="ignore"):
            out[block] = view[block]
        if finite:
            # What is stored is in order; a copy of another dtype may be infinite where it is not.
            _check_block(view[block] if view.dtype == whole.dtype else out[block], finite)
    return whole


def check_finite(view: np.ndarray, name: str) -> np.ndarray:
    """Returns an array of finite numbers; `name` names it in errors.

    Raises:
      NeoError: an entry is NaN or infinite.
    """
    for block in _blocks(view):
        _check_block(view[block], name)
    return view


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Returns an array whose memory begins at a multiple of 64 bytes: CPU devices take it as it is.

    They copy any other.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _blocks(view: np.ndarray) -> Iterator[tuple[slice, ...]]:
    axis = int(np.argmax(view.strides))
    step = max(1, _BLOCK_BYTES * view.shape[axis] // max(view.nbytes, 1))
    for start in range(0, view.shape[axis], step):
        yield (slice(None),) * axis + (slice(start, start + step),)


def _check_block(block: np.ndarray, name: str) -> None:
    """Looks at exponents, on integers: numpy has fast ones of every size, and no bfloat16."""
    bits = np.dtype(f"u{block.dtype.itemsize}")
    infinite = np.array(np.inf, block.dtype).view(bits)
    if (block.view(bits) & infinite == infinite).any():
        raise NeoError(
            f"{name} holds NaN or infinite numbers, as {block.dtype.name}; take the checkpoint of "
            "an earlier step, or a wider --dtype."
        )


def shard(
    view: np.ndarray,
    dtype: np.dtype,
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    finite: str = "",
) -> Array:
    """Places `view`, padded to `shape`, on its devices, copying each distinct slice once.

    Of `finite` see `copy`.
    """
    pieces: dict[tuple, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        parts = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        key = tuple((part.start, part.stop) for part in parts)
        if key not in pieces:
            # Indices beyond what is stored are cut off by numpy, and the padding fills in.
            pieces[key] = copy(view[index], dtype, tuple(map(len, parts)), finite)
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)


def to_host(array: Array | np.ndarray) -> np.ndarray:
    """Copies an array to the host through an alias, since JAX keeps the copy with the array."""
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable:
        return processes.to_host(array)
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
