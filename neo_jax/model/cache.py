"""Keys and values of the tokens so far, a `LayerCache` a layer, every leaf leading with batch.

A key at position p is kept in slot p modulo the number of slots. A global layer has a slot for
every position, so its cache is linear; a local layer has window + slack slots and wraps around.
Slots remember the position they hold, and masks are made from these: what a slot held before it was
overwritten is outside the window as long as one step appends no more than slack + 1 tokens.

Keys and values are floats, or int8 with a scale for each row, head and slot.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from neo_jax.axes import BATCH, HEAD_DIM, HEADS, KV_LENGTH, Array, Float, Int
from neo_jax.config import ModelConfig
from neo_jax.ops.cache_write import slot_axis, write_shard, write_slots
from neo_jax.ops.int8 import Int8, rounded
from neo_jax.ops.rounding import cast
from neo_jax.sharding.rules import Sharding, constrain

SLACK = 16
"""Slots of a local layer beyond its window: one step may append up to SLACK + 1 tokens."""


class LayerCache(NamedTuple):
    """What one layer attends to."""

    k: Float[Array, "B N S H"] | Int8
    v: Float[Array, "B N S H"] | Int8
    positions: Int[Array, "B S"]  # absolute position of the key in each slot, -1 where empty


Cache = tuple[LayerCache, ...]
"""One `LayerCache` for each layer."""


LOGICAL_AXES = {
    "k": (BATCH, HEADS, KV_LENGTH, HEAD_DIM),
    "v": (BATCH, HEADS, KV_LENGTH, HEAD_DIM),
    "positions": (BATCH, KV_LENGTH),
}
"""How the leaves of a layer's cache are split; int8's scales have the first of these axes."""


def place(sharding: Sharding | None, cache: LayerCache) -> LayerCache:
    """Tells the compiler how a layer's cache is sharded."""

    def sharded(name: str, part: Any) -> Any:
        axes, path = LOGICAL_AXES[name], f"the cache's {name}"
        return jax.tree.map(lambda x: constrain(sharding, x, axes[: x.ndim], path), part)

    return LayerCache(**{name: sharded(name, part) for name, part in cache._asdict().items()})


def num_slots(config: ModelConfig, layer: int, length: int, slack: int = SLACK) -> int:
    """Slots that a layer needs to decode up to `length` tokens, `slack` + 1 in a step."""
    window = config.window(layer)
    return length if window is None else min(length, window + slack)


def slack_for(config: ModelConfig, sharding: Sharding | None, piece: int) -> int:
    """Slack of a cache to which pieces of so many tokens are appended.

    The least there may be, and what makes a local layer's slots divide over the devices that share
    them.
    """
    shards = sharding.num_shards(KV_LENGTH) if sharding else 1
    return piece - 1 + -(config.window_size + piece - 1) % shards


def num_bytes(config: ModelConfig, slots: int, dtype: DTypeLike) -> int:
    """Returns the bytes of one layer's slots, for one sequence: keys, values, scales, positions."""
    scale = 4 if dtype == jnp.int8 else 0
    key = config.num_heads * (config.head_dim * np.dtype(dtype).itemsize + scale)
    return slots * (2 * key + 4)


class CacheBytes(NamedTuple):
    """Memory that the cache of a sequence takes, on all devices together."""

    per_token: int  # while all layers grow
    per_token_beyond_window: int  # of global layers alone: local ones have wrapped around
    per_sequence: int


def sequence_bytes(config: ModelConfig, length: int, dtype: DTypeLike) -> CacheBytes:
    """Returns the memory of the cache of a sequence of up to `length` tokens."""
    layers = range(config.num_layers)
    slot = num_bytes(config, 1, dtype)
    num_global = sum(config.window(i) is None for i in layers)
    slots = sum(num_slots(config, i, length) for i in layers)
    return CacheBytes(slot * len(layers), slot * num_global, slot * slots)


def extend(
    cache: LayerCache,
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    positions: Int[Array, "B T"],
    sharding: Sharding | None = None,
) -> LayerCache:
    """Writes new keys and values into the slots of their positions; those at -1 are dropped."""
    new = LayerCache(_like(cache.k, k), _like(cache.v, v), positions)
    if sharding is None or sharding.mesh.size == 1:
        return write_slots(cache, new)
    names, shards = sharding.mesh_axes(KV_LENGTH), sharding.num_shards(KV_LENGTH)

    def write(cache: LayerCache, new: LayerCache) -> LayerCache:
        if shards == 1:
            return write_slots(cache, new)
        return write_shard(cache, new, jax.lax.axis_index(names), shards)

    def specs(layer: LayerCache, axes: Mapping[str, Sequence[str | None]]) -> LayerCache:
        def spec(name: str, part: Any) -> Any:
            path = f"the cache's {name}"
            return jax.tree.map(lambda x: sharding.spec(axes[name][: x.ndim], x.shape, path), part)

        return LayerCache(**{name: spec(name, part) for name, part in layer._asdict().items()})

    of_new = {
        name: [None if axis == KV_LENGTH else axis for axis in axes]
        for name, axes in LOGICAL_AXES.items()
    }
    # Each device writes its rows: left to the compiler, it first brings those of all together.
    on_each_device = jax.shard_map(
        write,
        mesh=sharding.mesh,
        in_specs=(specs(cache, LOGICAL_AXES), specs(new, of_new)),
        out_specs=specs(cache, LOGICAL_AXES),
        check_vma=False,
    )
    return on_each_device(cache, new)


def _like(old: Array | Int8, new: Array) -> Array | Int8:
    """Returns new keys or values as the cache holds them."""
    return rounded(new, 1) if isinstance(old, Int8) else new


def rollback(cache: Cache, lengths: Int[Array, "B"]) -> Cache:
    """Forgets the tokens of each row at positions from `lengths` on.

    What they overwrote stays lost: in a local layer keys outside the window of whatever is
    appended next, as long as no more than SLACK tokens are forgotten.
    """
    return tuple(
        layer._replace(positions=jnp.where(layer.positions < lengths[:, None], layer.positions, -1))
        for layer in cache
    )


def from_sequence(
    config: ModelConfig,
    sequence: Sequence[LayerCache],
    lengths: Int[Array, "B"],
    length: int,
    dtype: DTypeLike | None = None,
    slack: int = SLACK,
) -> Cache:
    """Turns the keys and values of whole prompts into a cache to go on from.

    Args:
      config: the model.
      sequence: what each layer attended to in a forward pass without a cache, [B, N, T, H], where
        token t is at index t; or a cache.
      lengths: tokens of each row to keep; what follows is padding.
      length: tokens, prompt included, that the cache must be able to hold.
      dtype: of its keys and values, int8 or a floating-point type; None keeps that of `sequence`.
      slack: slots of local layers beyond their window.

    Returns:
      A cache of `num_slots` slots a layer that holds each row's newest tokens.
    """
    cache = []
    for i, layer in enumerate(sequence):
        # The newest position of slot s is the largest p < length with p % slots == s.
        slots, newest = num_slots(config, i, length, slack), lengths[:, None] - 1
        positions = newest - (newest - jnp.arange(slots)[None, :]) % slots
        index = (jnp.clip(positions, 0) % layer.positions.shape[1])[:, None, :, None]
        is_global = config.window(i) is None

        def kept(
            part: Any, index: Array = index, slots: int = slots, is_global: bool = is_global
        ) -> Array | Int8:
            if is_global:  # slots are positions; a gather would bring together what a mesh splits
                part = _fit(part, slots)
            else:
                part = jnp.take_along_axis(part, index, axis=2, mode="clip")
            return rounded(part, 1) if dtype == jnp.int8 else cast(part, dtype or part.dtype)

        k, v = kept(layer.k), kept(layer.v)
        cache.append(LayerCache(k, v, jnp.where(positions >= 0, positions, -1)))
    return tuple(cache)


def resize(config: ModelConfig, cache: Cache, length: int) -> Cache:
    """Gives a cache the slots to decode up to `length` tokens, more than there were or fewer.

    Texts must fit: of a row that holds a position of `length` or more, keys are lost.
    """
    # Where the number of slots changes no sequence has wrapped around yet: slots are positions.
    return tuple(
        jax.tree.map(functools.partial(_fit, slots=num_slots(config, i, length)), layer)
        for i, layer in enumerate(cache)
    )


def _fit(leaf: Array, slots: int) -> Array:
    """Returns a leaf's first slots, empty ones after those that there are."""
    axis = slot_axis(leaf.ndim)
    kept = jax.lax.slice_in_dim(leaf, 0, min(slots, leaf.shape[axis]), axis=axis)
    widths = [(0, slots - n if i == axis else 0) for i, n in enumerate(kept.shape)]
    return jnp.pad(kept, widths, constant_values=-1 if leaf.ndim == 2 else 0)  # positions


def empty(
    config: ModelConfig, rows: int, length: int, dtype: DTypeLike, slack: int = SLACK
) -> Cache:
    """Returns a cache of rows that hold nothing, with the slots to decode up to `length` tokens."""

    def part(slots: int) -> Array | Int8:
        shape = (rows, config.num_heads, slots, config.head_dim)
        zeros = jnp.zeros(shape, dtype)
        return Int8(zeros, jnp.zeros(shape[:-1], jnp.float32)) if dtype == jnp.int8 else zeros

    slots = [num_slots(config, i, length, slack) for i in range(config.num_layers)]
    return tuple(LayerCache(part(n), part(n), jnp.full((rows, n), -1, jnp.int32)) for n in slots)


def clear_rows(cache: Cache, rows: Int[Array, "..."]) -> Cache:
    """Empties rows: they see nothing of what was there."""

    def emptied(positions: Array) -> Array:  # by comparing, as a mesh may split rows
        chosen = jnp.arange(positions.shape[0])[:, None] == jnp.ravel(rows)[None]
        return jnp.where(jnp.any(chosen, axis=1, keepdims=True), -1, positions)

    return tuple(layer._replace(positions=emptied(layer.positions)) for layer in cache)
