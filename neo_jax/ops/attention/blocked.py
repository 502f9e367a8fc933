"""Attention in blocks of queries, each against just the range of keys that it can see.

For a local layer the work grows with T times the window and not with T squared; for a global
layer the half of the logits that causality hides is never computed. The largest array is one
block's logits, also in the backward pass: it forms a block's weights again from the logarithms of
the softmax's sums (Dao et al., "FlashAttention", 2022, algorithm 4).
"""

import functools
from itertools import starmap

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float
from neo_jax.ops.attention.dense import HIDDEN
from neo_jax.ops.attention.mask import Mask
from neo_jax.ops.matmul import product
from neo_jax.ops.rounding import cast

BLOCK_SIZE = 256

_Positions = tuple[Array, Array, Array | None]
_Blocks = tuple[tuple[int, int, int, int], ...]


def blocked(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    mask: Mask,
    block_size: int = BLOCK_SIZE,
) -> Float[Array, "B N T H"]:
    """Equals `dense`, for sequences of any length.

    Of an aligned mask only what a window and causality leave is computed, of another everything.
    """
    # Without a barrier XLA folds transpositions into products, and its CPU backend cannot run every
    # bfloat16 product that results.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    positions = (mask.q_positions, mask.k_positions, mask.segment_starts)
    blocks = _blocks(q.shape[2], k.shape[2], mask.aligned, mask.window, block_size)
    return _blocked(mask.window, blocks, q, k, v, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(
    window: int | None, blocks: _Blocks, q: Array, k: Array, v: Array, positions: _Positions
) -> Array:
    return _forward(window, blocks, q, k, v, positions)[0]


def _forward(
    window: int | None, blocks: _Blocks, q: Array, k: Array, v: Array, positions: _Positions
) -> tuple[Array, tuple]:
    mask = _mask(positions, window)
    multiply = functools.partial(product, dtype=q.dtype)
    outputs, log_sums = [], []
    for queries, keys in starmap(_slices, blocks):
        logits = multiply("bnth,bnsh->bnts", q[:, :, queries], k[:, :, keys])
        logits = jnp.where(mask.block(queries, keys).visible()[:, None], logits, HIDDEN)
        largest = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        outputs.append(multiply("bnts,bnsh->bnth", weights, v[:, :, keys]) / total)
        log_sums.append((largest + jnp.log(total)).swapaxes(2, 3))
    y, log_sum = jnp.concatenate(outputs, axis=2), jnp.concatenate(log_sums, axis=3)
    return y, (q, k, v, positions, y, log_sum)


def _backward(
    window: int | None, blocks: _Blocks, saved: tuple, grad: Array
) -> tuple[Array | None, ...]:
    q, k, v, positions, y, log_sum = saved
    mask = _mask(positions, window)
    multiply = functools.partial(product, dtype=q.dtype)
    dots = jnp.sum(grad * y, axis=-1)[:, :, None]
    grad = jax.lax.optimization_barrier(cast(grad, v.dtype))
    grads_q = []
    grad_k = grad_v = jnp.zeros(k.shape, jnp.float32)
    # Keys come first in a block's weights, "bnst": only one of the products transposes an operand.
    for queries, keys in starmap(_slices, blocks):
        block_q, block_k, block_grad = q[:, :, queries], k[:, :, keys], grad[:, :, queries]
        logits = multiply("bnsh,bnth->bnst", block_k, block_q)
        visible = mask.block(queries, keys).visible()[:, None].swapaxes(2, 3)
        weights = jnp.where(visible, jnp.exp(logits - log_sum[..., queries]), 0)
        grad_weights = multiply("bnsh,bnth->bnst", v[:, :, keys], block_grad)
        grad_logits = cast(weights * (grad_weights - dots[..., queries]), q.dtype)
        grads_q.append(multiply("bnst,bnsh->bnth", grad_logits, block_k))
        grad_k = grad_k.at[:, :, keys].add(multiply("bnst,bnth->bnsh", grad_logits, block_q))
        grad_v = grad_v.at[:, :, keys].add(multiply("bnst,bnth->bnsh", weights, block_grad))
    grad_q = jnp.concatenate(grads_q, axis=2)
    grads = (cast(grad_q, q.dtype), cast(grad_k, k.dtype), cast(grad_v, v.dtype))
    return *grads, None


_blocked.defvjp(_forward, _backward)


def _mask(positions: _Positions, window: int | None) -> Mask:
    of_queries, of_keys, segment_starts = positions
    return Mask(of_queries, of_keys, window, segment_starts=segment_starts)


def _blocks(queries: int, keys: int, aligned: bool, window: int | None, size: int) -> _Blocks:
    """Returns blocks of queries, and the keys that each can see: where both begin and end."""
    blocks = []
    for start in range(0, queries, size):
        stop, first, last = min(start + size, queries), 0, keys
        if aligned:
            offset = keys - queries  # query t and key t + offset are one token
            first = 0 if window is None else max(0, start + offset - window + 1)
            last = stop + offset
        blocks.append((start, stop, first, last))
    return tuple(blocks)


def _slices(start: int, stop: int, first: int, last: int) -> tuple[slice, slice]:
    return slice(start, stop), slice(first, last)
