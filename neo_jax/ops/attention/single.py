"""Attention of one query a row, as a step of decoding has it, in the form that CPUs compute fast.

XLA's CPU backend computes the product of each head's keys and its query by itself, on one thread,
and first makes float32 of keys of other types. Written out as sums of slices, the same is a loop
over keys and values as they are stored, each read once, on all threads and in vector registers.
"""

import functools
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Bool, Float
from neo_jax.ops.attention.dense import HIDDEN
from neo_jax.ops.attention.mask import Mask
from neo_jax.ops.int8 import Int8

LANES = 8
"""Numbers that are summed side by side: those of a vector register of 256 bits."""


@jax.jit  # a name, by which its products are counted
def single(
    q: Float[Array, "B N 1 H"],
    k: Float[Array, "B N S H"] | Int8,
    v: Float[Array, "B N S H"] | Int8,
    mask: Mask,
) -> Float[Array, "B N 1 H"]:
    """Equals `dense` for one query; S and H are multiples of `LANES`. Sums are float32."""
    q, seen = q[:, :, 0].astype(jnp.float32), mask.visible()
    if len(q) > 1:
        return _attend(q, k, v, seen)[:, :, None]
    # With a batch axis of 1 around its slots a cache would be copied at every step.
    q, k, v, seen = jax.tree.map(lambda x: x[0], (q, k, v, seen))
    return _attend(q, k, v, seen)[None, :, None]


def _attend(
    q: Float[Array, "*B N H"],
    k: Float[Array, "*B N S H"] | Int8,
    v: Float[Array, "*B N S H"] | Int8,
    seen: Bool[Array, "*B 1 S"],
) -> Float[Array, "*B N H"]:
    keys, values = (x.values if isinstance(x, Int8) else x for x in (k, v))
    logits = _logits(q, keys)
    if isinstance(k, Int8):
        logits *= k.scale
    # Without the barrier each step of the softmax would form the logits again.
    logits = jax.lax.optimization_barrier(jnp.where(seen, logits, HIDDEN))
    weights = jax.nn.softmax(logits, axis=-1)
    if isinstance(v, Int8):
        weights *= v.scale
    return _weighted_sum(weights, values)


def _logits(q: Array, k: Array) -> Array:
    """Returns the products of a query and each key, [..., S]: lane by lane, then of the lanes."""
    parts = [slice(i, i + LANES) for i in range(0, q.shape[-1], LANES)]
    lanes = _sum(q[..., None, part] * k[..., part].astype(jnp.float32) for part in parts)
    return _sum(lanes[..., lane] for lane in range(LANES))


def _weighted_sum(weights: Array, v: Array) -> Array:
    """Returns the sum of values by weights [..., S], [..., H]: first of every few in a row."""
    few = (*weights.shape[:-1], -1, LANES)
    weights, v = weights.reshape(few), v.reshape((*few, v.shape[-1]))
    parts = _sum(
        weights[..., lane, None] * v[..., lane, :].astype(jnp.float32) for lane in range(LANES)
    )
    # What is left is small. Without the barrier all would be one loop, on one thread.
    return jax.lax.optimization_barrier(parts).sum(axis=-2)


def _sum(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)
