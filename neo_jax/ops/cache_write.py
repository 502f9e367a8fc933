"""Writing new entries into the slots of a cache, in the way that each platform does in place.

For a scatter a TPU's compiler lays the cache out anew before and after each step; for a slice a
CPU's makes all bfloat16 float32.
"""

from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Int
from neo_jax.ops.rounding import cast


@runtime_checkable
class Slots(Protocol):
    """A layer's cache, a pytree of leaves [B, S] and [B, N, S, ...]."""

    @property
    def positions(self) -> Int[Array, "B S"]:
        """The position that each slot holds."""


Layer = TypeVar("Layer", bound=Slots)

FEW = 17
"""Tokens of a row, those of a draft, that are written one by one where writes are slices."""


def write_slots(cache: Layer, new: Layer) -> Layer:
    """Returns the cache with new entries, which have tokens in the place of slots.

    A token at position p belongs in slot p modulo the number of slots; tokens at -1 are dropped.
    More than `FEW` tokens of a row follow each other: position p + i, or -1, comes i after p.
    """
    few = new.positions.shape[1] <= FEW
    tpu = write_in_turn if few else write_in_blocks
    return jax.lax.platform_dependent(cache, new, tpu=tpu, default=write_at_once)


def write_shard(cache: Layer, new: Layer, shard: Int[Array, ""], num_shards: int) -> Layer:
    """Does what `write_slots` does to one of the shards of a cache whose slots are split.

    Where it is left to the compiler, it brings all slots together.
    """
    size, positions = cache.positions.shape[1], new.positions
    # A multiple of the size: so position p modulo the size is the place of its slot in a shard.
    is_here = (positions >= 0) & (positions % (num_shards * size) // size == shard)
    new = jax.tree.map(lambda x: jnp.where(is_here, x, -1) if x is positions else x, new)
    tpu = write_in_turn if positions.shape[1] <= FEW else write_at_once  # not one after another
    return jax.lax.platform_dependent(cache, new, tpu=tpu, default=write_at_once)


def slot_axis(ndim: int) -> int:
    """Returns which axis of a leaf of a layer's cache are the slots."""
    return min(ndim - 1, 2)


def write_in_turn(cache: Layer, new: Layer) -> Layer:
    """Writes one token of one row after another, as slices."""
    rows, tokens = new.positions.shape
    slots = cache.positions.shape[1]

    def write_one(i: Array, cache: Layer) -> Layer:
        row, token = i // tokens, i % tokens
        position = new.positions[row, token]

        def write(old: Array, new: Array) -> Array:
            axis = slot_axis(new.ndim)
            source, place = [row] + [0] * (new.ndim - 1), [row] + [0] * (new.ndim - 1)
            source[axis], place[axis] = token, position % slots
            sizes = [size if i not in (0, axis) else 1 for i, size in enumerate(new.shape)]
            new = cast(jax.lax.dynamic_slice(new, source, sizes), old.dtype)
            here = jax.lax.dynamic_slice(old, place, sizes)
            return jax.lax.dynamic_update_slice(old, jnp.where(position >= 0, new, here), place)

        return jax.tree.map(write, cache, new)

    return jax.lax.fori_loop(0, rows * tokens, write_one, cache)


def write_in_blocks(cache: Layer, new: Layer) -> Layer:
    """Writes all tokens of one row after another, as two slices: up to the last slot, and the rest.

    No more than there are slots, and no token before the first that is not dropped. In a loop, for
    of slices that follow each other in a program a TPU's compiler copies the cache.
    """
    rows, tokens = new.positions.shape
    slots = cache.positions.shape[1]
    if tokens > slots:
        return write_in_turn(cache, new)

    def write_block(i: Array, cache: Layer) -> Layer:
        row, is_rest = i // 2, i % 2
        mine = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), new)
        first = jnp.maximum(mine.positions[0, 0], 0) % slots
        place = jnp.where(is_rest, 0, jnp.minimum(first, slots - tokens))
        # Token i belongs in slot place + shift + i; the rest is at the end without its beginning.
        shift = first - jnp.where(is_rest, slots, place)
        index = jnp.arange(tokens) - shift
        known = jnp.take(mine.positions[0], index, mode="clip")
        wanted = (index >= 0) & (index < tokens) & (known >= 0)

        def write(old: Array, new: Array) -> Array:
            axis = slot_axis(new.ndim)
            start = [jnp.int32(0)] * new.ndim
            start[0], start[axis] = row, place
            here = jax.lax.dynamic_slice(old, start, new.shape)
            which = wanted.reshape([-1 if i == axis else 1 for i in range(new.ndim)])
            shifted = cast(_shifted(new, shift, axis), old.dtype)
            return jax.lax.dynamic_update_slice(old, jnp.where(which, shifted, here), start)

        return jax.tree.map(write, cache, mine)

    return jax.lax.fori_loop(0, 2 * rows, write_block, cache)


def _shifted(x: Array, shift: Array, axis: int) -> Array:
    """Returns element i - shift in the place of element i; where there is none, anything."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(size, size) if i == axis else (0, 0) for i in range(x.ndim)])
    return jax.lax.dynamic_slice_in_dim(padded, size - shift, size, axis)


def write_at_once(cache: Layer, new: Layer) -> Layer:
    """Writes all tokens of all rows by one scatter a leaf."""
    slots, positions = cache.positions.shape[1], new.positions
    if positions.shape == (1, 1):
        return _write_one(cache, new)
    rows = jnp.arange(positions.shape[0])[:, None]
    index = jnp.where(positions >= 0, positions % slots, slots)

    def write(old: Array, new: Array) -> Array:
        new = cast(new, old.dtype)
        if new.ndim == 2:
            return old.at[rows, index].set(new, mode="drop")
        # Two index arrays around a slice put their axes in front: [B, T, N, ...].
        return old.at[rows, :, index].set(new.swapaxes(1, 2), mode="drop")

    return jax.tree.map(write, cache, new)


def _write_one(cache: Layer, new: Layer) -> Layer:
    """Writes one token of one row, as a slice of arrays without their batch axis.

    XLA's CPU backend moves an axis of size 1 about, and then copies the cache at every step.
    """
    position = new.positions[0, 0]
    slot = position % cache.positions.shape[1]

    def write(old: Array, new: Array) -> Array:
        axis = slot_axis(new.ndim) - 1
        here = jax.lax.dynamic_slice_in_dim(old[0], slot, 1, axis)
        new = jnp.where(position >= 0, cast(new[0], old.dtype), here)
        return jax.lax.dynamic_update_slice_in_dim(old[0], new, slot, axis)[None]

    return jax.tree.map(write, cache, new)
