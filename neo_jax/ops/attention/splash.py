"""Attention by the TPU kernel that comes with JAX: `splash`, which skips blocks nobody sees.

It knows indices and not positions, and documents by segment ids; neither the logits nor the mask
ever leave the chip's own memory. Its backward pass forms the weights again, as `blocked` does.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from neo_jax.axes import Array, Float
from neo_jax.ops.attention.mask import Mask

LANES = 128  # of a TPU's registers: lengths are padded to a multiple
BLOCK_SIZES = (512, 256, LANES)


def splash(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    mask: Mask,
    interpret: bool = False,
) -> Float[Array, "B N T H"]:
    """Equals `dense` for a sequence that attends to itself, its output rounded to q's dtype.

    On a mesh this is for one device's rows and heads: `attend` sees to it. Rows are padded on the
    right, in the future, to a multiple of 128.

    The mask is aligned; tokens before a query's start are hidden where they belong to another
    start. `interpret` runs the kernel step by step where there is no TPU; slow.
    """
    length = q.shape[2]
    fill = -length % LANES
    q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, fill), (0, 0))) for x in (q, k, v))
    segments = None
    if mask.segment_starts is not None:
        documents = jnp.where(mask.q_positions >= 0, mask.segment_starts, -1)
        documents = jnp.pad(documents, ((0, 0), (0, fill)), constant_values=-1)
        segments = splash_attention.SegmentIds(documents, documents)
    size, shape = block_size(length + fill, mask.window), (length + fill,) * 2
    visible: splash_attention.CausalMask | splash_attention.LocalMask
    if mask.window is None:
        visible = splash_attention.CausalMask(shape)
    else:  # to the left of a query its window but for itself, to the right nothing
        visible = splash_attention.LocalMask(shape, (mask.window - 1, 0), offset=0)
    kernel = splash_attention.make_splash_mha(
        splash_attention.MultiHeadMask([visible] * q.shape[1]),
        block_sizes=splash_attention.BlockSizes(
            block_q=size,
            block_kv=size,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_q_dq=size,
            block_kv_dq=size,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    return jax.vmap(kernel)(q, k, v, segments)[:, :, :length].astype(jnp.float32)


def block_size(length: int, window: int | None) -> int:
    """Returns the side of the blocks of logits: large, but no wider than the window.

    A wider block would be mostly hidden: at a window of 256 and 2048 tokens blocks of 512 form 1.9
    times the logits that blocks of 256 do. The length is a multiple of 128.
    """
    widest = length if window is None else max(window, LANES)
    return next(size for size in BLOCK_SIZES if size <= widest and length % size == 0)
