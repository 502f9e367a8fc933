"""Attention by several implementations of one signature, `attend(q, k, v, mask)`.

| name    | what                                                    | when                      |
|---------|---------------------------------------------------------|---------------------------|
| dense   | every query against every key; the plain one, the oracle | decoding                  |
| blocked | blocks of queries against the keys that they can see     | whole sequences           |
"""

from typing import Literal

from neo_jax.attention.blocked import blocked
from neo_jax.attention.dense import dense
from neo_jax.attention.mask import Mask
from neo_jax.axes import Array, Float
from neo_jax.errors import NeoError, suggest

Kernel = Literal["auto", "dense", "blocked"]
KERNELS = {"dense": dense, "blocked": blocked}


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"],
    v: Float[Array, "B N S H"],
    mask: Mask,
    kernel: Kernel = "auto",
) -> Float[Array, "B N T H"]:
    """Softmax attention without scaling, as GPT-Neo has it: softmax(q k^T + mask) v.

    Args:
      q: queries.
      k: keys.
      v: values.
      mask: which key each query sees.
      kernel: which implementation; "auto" takes blocked where the sequence attends to itself, and
        dense otherwise.

    Raises:
      NeoError: unknown kernel, or one that cannot do what is asked.
    """
    if kernel == "auto":
        kernel = "blocked" if mask.aligned else "dense"
    if kernel not in KERNELS:
        raise NeoError(f"unknown attention kernel '{kernel}'.{suggest(kernel, KERNELS)}")
    return KERNELS[kernel](q, k, v, mask)


__all__ = ["KERNELS", "Kernel", "Mask", "attend", "blocked", "dense"]
