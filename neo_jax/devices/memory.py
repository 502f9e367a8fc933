"""How many bytes of a device's memory an array takes, and how many there are; what cannot fit."""

import itertools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax

from neo_jax.errors import NeoError

_MOST_TOKENS = 2**31 - 1  # of a batch: indices have 32 bits


def machine_bytes() -> float:
    """Returns the bytes of this machine's memory; infinity where it is not known."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return math.inf


def device_memory(num_devices: int = 0) -> float:
    """Returns the bytes that a device of this process has; infinity where that is not known.

    Devices of a CPU share the machine's memory equally: so many of them, or all.
    """
    devices = jax.local_devices()
    num_devices = num_devices or len(devices)
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices]
        return min(limits)
    return machine_bytes() / num_devices


def check_batch(rows: int, length: int, row_bytes: float = 0, num_devices: int = 1) -> None:
    """Checks by arithmetic alone, before anything is allocated, that a batch can be.

    Args:
      rows: sequences of the batch.
      length: tokens of each.
      row_bytes: that a sequence takes of the devices, at least; 0 where they need not be here.
      num_devices: that share the batch.

    Raises:
      NeoError: it has more tokens than there are indices, or takes more memory than there is.
    """
    if rows * length > _MOST_TOKENS:
        raise NeoError(
            f"a batch of {rows} sequences of {length} tokens has more than {_MOST_TOKENS} tokens; "
            "take fewer at a time."
        )
    if not row_bytes:
        return
    needed, there = rows * row_bytes, num_devices * device_memory(num_devices)
    if needed > there:
        raise NeoError(
            f"a batch of {rows} sequences of {length} tokens takes at least {needed / 1e9:,.0f} GB "
            f"of {there / 1e9:,.0f}; take fewer at a time."
        )


def peak_memory() -> float:
    """Returns the most bytes that a device of this process has held so far; NaN where unknown.

    A CPU's is the memory of the whole process.
    """
    if jax.default_backend() == "cpu":
        import resource  # which Windows lacks

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", math.nan) for each in stats)


def device_bytes(leaf: Any, tiled: bool) -> int:
    """Returns the bytes that each device holds of an array; without a sharding that is all of it.

    `tiled` is for devices that keep arrays in tiles, as TPUs do.
    """
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape
    itemsize = leaf.dtype.itemsize
    if not tiled:
        return math.prod(shape) * itemsize
    layout = leaf.format.layout
    return tiled_bytes(shape, itemsize, layout and layout.major_to_minor)


def tree_bytes(tree: Any, tiled: bool | None = None) -> int:
    """Returns the sum of `device_bytes` of a tree, tiled by default as devices here are."""
    if tiled is None:
        tiled = jax.default_backend() == "tpu"
    return sum(device_bytes(leaf, tiled) for leaf in jax.tree.leaves(tree))


def tiled_bytes(shape: Sequence[int], itemsize: int, order: Sequence[int] | None = None) -> int:
    """Returns the bytes of an array in a TPU's memory.

    Its last two axes, in the order given or else that which wastes least, are cut into tiles of
    8 x 128 entries, or of fewer rows where that is enough; entries of less than four bytes are
    packed by rows. A vector is cut into tiles of up to 1024 entries. What does not fill its tiles
    is padding: 768 floats take 1024. (A test compares the compiler's figures.)
    """
    packed = max(1, 4 // itemsize)  # rows that share a word
    if 0 in shape:
        return 0
    if len(shape) < 2:
        size = math.prod(shape)
        tile = min(1024, max(128 * packed, _power_of_two(size)))
        return _round_up(size, tile) * itemsize

    def padded(rows: int, columns: int) -> int:
        tile = min(8, max(packed, _power_of_two(rows)))
        return _round_up(rows, tile) * _round_up(columns, 128)

    pairs = [tuple(order[-2:])] if order else itertools.permutations(range(len(shape)), 2)
    size = math.prod(shape)
    least = min(
        size // (shape[rows] * shape[columns]) * padded(shape[rows], shape[columns])
        for rows, columns in pairs
    )
    return least * itemsize


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()  # the least that is at least `size`


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def bytes_text(size: float, digits: int = 2) -> str:
    """Returns bytes in words, with so many digits after the point: "1.23 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.{digits}f} {unit}"
