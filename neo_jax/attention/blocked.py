"""Attention in blocks of queries, each against just the range of keys that it can see.

For a local layer the work grows with T times the window and not with T squared; for a global
layer the half of the logits that causality hides is never computed. The largest array is one
block's logits.
"""

import jax.numpy as jnp

from neo_jax.attention.dense import dense
from neo_jax.attention.mask import Mask
from neo_jax.axes import Array, Float
from neo_jax.errors import NeoError

BLOCK_SIZE = 256


def blocked(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    mask: Mask,
    block_size: int = BLOCK_SIZE,
) -> Float[Array, "B N T H"]:
    """Equals `dense` for a sequence that attends to itself; any length T.

    Raises:
      NeoError: queries and keys are not the same tokens; take kernel "dense" for a cache.
    """
    if not mask.aligned:
        raise NeoError(
            "the 'blocked' kernel serves a sequence that attends to itself; use 'dense'."
        )
    length = q.shape[2]
    outputs = []
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        queries, keys = slice(start, stop), slice(first, stop)
        outputs.append(
            dense(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask.block(queries, keys))
        )
    return jnp.concatenate(outputs, axis=2)
