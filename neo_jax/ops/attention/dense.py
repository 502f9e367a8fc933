"""Attention with every logit written out: the plain implementation that others must equal."""

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float
from neo_jax.ops.attention.mask import Mask
from neo_jax.ops.int8 import Int8

HIDDEN = jnp.finfo(jnp.float32).min
"""The logit of a key that its query does not see."""


def dense(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"] | Int8,
    v: Float[Array, "B N S H"] | Int8,
    mask: Mask,
) -> Float[Array, "B N T H"]:
    """Returns softmax(q k^T) v over the visible keys, in float32; logits take B N T S floats.

    Of int8 keys and values, whose scales are of a slot, logits and weights take the scales.

    A query that sees nothing gets the mean of all values, a finite number that nobody reads.
    """
    taken = weights(q, k, mask)
    if isinstance(v, Int8):
        return _product("bnts,bnsh->bnth", taken * v.scale[:, :, None], v.values)
    return _product("bnts,bnsh->bnth", taken.astype(v.dtype), v)


def weights(
    q: Float[Array, "B N T H"], k: Float[Array, "B N S H"] | Int8, mask: Mask
) -> Float[Array, "B N T S"]:
    """Returns softmax(q k^T) over the visible keys: how much each query takes of each value."""
    if isinstance(k, Int8):
        logits = _product("bnth,bnsh->bnts", q, k.values) * k.scale[:, :, None]
    else:
        logits = _product("bnth,bnsh->bnts", q, k)
    logits = jnp.where(mask.visible()[:, None], logits, HIDDEN)
    return jax.nn.softmax(logits, axis=-1)


def _product(equation: str, x: Array, y: Array) -> Array:
    # In float32 whatever the operands: XLA's CPU backend cannot run every batched bfloat16
    # product with a float32 result, and products of two bfloat16 numbers are exact in float32.
    return jnp.einsum(
        equation,
        x.astype(jnp.float32),
        y.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )
