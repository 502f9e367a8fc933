"""Attention by the NVIDIA kernel behind `jax.nn.dot_product_attention`: cuDNN's flash attention."""

from typing import Literal

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float
from neo_jax.ops.attention.mask import Mask


def cudnn(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    mask: Mask,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B N T H"]:
    """Equals `dense` for a sequence that attends to itself, its output rounded to q's dtype.

    On a mesh this is for one device's rows and heads: `attend` sees to it. Rows of an odd length
    are padded on the right, in the future: cuDNN has no gradient of those.

    The mask is aligned, without `segment_starts`. The implementation "xla" computes the same on any
    device, for tests.
    """
    length = q.shape[2]
    fill = ((0, 0), (0, 0), (0, length % 2), (0, 0))
    q, k, v = (jnp.pad(x, fill).swapaxes(1, 2) for x in (q, k, v))
    y = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=1.0,
        is_causal=True,
        # To the left of a query its window but for itself, to the right nothing.
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation=implementation,
    )
    return y.swapaxes(1, 2)[:, :, :length].astype(jnp.float32)
