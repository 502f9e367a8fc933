"""Attention by the TPU kernel that comes with JAX: `splash`, which skips blocks nobody sees.

It knows indices and not positions, and documents by segment ids; neither the logits nor the mask
ever leave the chip's own memory. Its backward pass forms the weights again, as `blocked` does.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention

from neo_jax.axes import Array, Float
from neo_jax.ops.attention.mask import Mask

LANES = 128  # of a TPU's registers: lengths are padded to a multiple
BLOCK_SIZES = (2048, 1024, 512, 256, LANES)
USUAL_SIZE = 512  # the largest that is taken unless a kernel's name says another

_NOWHERE = -1  # the document of what only fills a block


def splash(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    mask: Mask,
    kernel: Any = None,
    interpret: bool = False,
    largest: int = USUAL_SIZE,
) -> Float[Array, "B N T H"]:
    """Equals `dense` for a sequence that attends to itself, its output rounded to q's dtype.

    On a mesh this is for one device's rows and heads: `attend` sees to it. Rows are padded on the
    right, in the future, to a multiple of 128.

    The mask is aligned, or `kernel` is what `causal_kernel` returns for the queries; tokens before
    a query's start are hidden where they belong to another start. `interpret` runs the kernel step
    by step where there is no TPU; slow. `largest` is the side of the blocks, where the window and
    the length allow it.
    """
    length, keys = q.shape[2], k.shape[2]
    q, k, v = map(_filled, (q, k, v))
    segments = None
    if mask.segment_starts is not None:
        starts = mask.segment_starts
        of_keys = starts if mask.k_segment_starts is None else mask.k_segment_starts
        segments = splash_attention.SegmentIds(
            _documents(starts, mask.q_positions), _documents(of_keys, mask.k_positions)
        )
    if kernel is None:
        shape = (q.shape[2], k.shape[2])
        visible: splash_attention.CausalMask | splash_attention.LocalMask
        if mask.window is None:
            visible = splash_attention.CausalMask(shape, keys - length)
        else:  # to the left of a query its window but for itself, to the right nothing
            window = (mask.window - 1, 0)
            visible = splash_attention.LocalMask(shape, window, offset=keys - length)
        kernel = _kernel(visible, q.shape[1], 1, mask.window, interpret, largest)
    return jax.vmap(kernel)(q, k, v, segments)[:, :, :length].astype(jnp.float32)


def causal_kernel(
    indices: np.ndarray, num_keys: int, num_heads: int, interpret: bool = False
) -> Any:
    """Returns the kernel of a causal layer whose queries are at these indices of the keys.

    Args:
      indices: [shards, T], those of each device's queries.
      num_keys: of the whole sequence; every device has all of them.
      num_heads: of a device.
      interpret: as for `splash`.

    Returns:
      A kernel of all devices, whose `manual_sharding_spec` says which part of it each takes.
    """
    fill = -indices.shape[1] % LANES
    indices = np.pad(indices, ((0, 0), (0, fill)), mode="edge").astype(np.int32)
    visible = splash_attention.CausalMask((indices.size, num_keys + -num_keys % LANES))
    visible.q_sequence = indices.reshape(-1)
    return _kernel(visible, num_heads, len(indices), None, interpret)


def _kernel(
    visible: Any,
    num_heads: int,
    shards: int,
    window: int | None,
    interpret: bool,
    largest: int = USUAL_SIZE,
) -> Any:
    queries, keys = visible.shape[0] // shards, visible.shape[1]
    of_queries, of_keys = (block_size(size, window, largest) for size in (queries, keys))
    return splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([visible] * num_heads),
        block_sizes=splash_attention.BlockSizes(
            block_q=of_queries,
            block_kv=of_keys,
            block_q_dkv=of_queries,
            block_kv_dkv=of_keys,
            block_q_dq=of_queries,
            block_kv_dq=of_keys,
        ),
        head_shards=1,
        q_seq_shards=shards,
        interpret=interpret,
    )


def _filled(x: Array, value: int = 0) -> Array:
    """Returns [B, N, T, H], or [B, T], padded to a multiple of `LANES` tokens."""
    axis = min(x.ndim - 1, 2)
    widths = [(0, -n % LANES if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)


def _documents(starts: Array, positions: Array) -> Array:
    """Returns the segment ids of tokens, padded: where the document of each begins."""
    return _filled(jnp.where(positions >= 0, starts, _NOWHERE), _NOWHERE)


def block_size(length: int, window: int | None, largest: int = USUAL_SIZE) -> int:
    """Returns the side of the blocks of logits: large, but no wider than the window.

    A wider block would be mostly hidden: at a window of 256 and 2048 tokens blocks of 512 form 1.9
    times the logits that blocks of 256 do. The length is a multiple of 128.
    """
    widest = min(length if window is None else max(window, LANES), largest)
    return next(size for size in BLOCK_SIZES if size <= widest and length % size == 0)
