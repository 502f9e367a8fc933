"""One vector of the hidden states of a text: how much each token counts in it."""

from typing import Literal, get_args

import numpy as np

from neo_jax.errors import NeoError, suggest

Pooling = Literal["", "mean", "last", "weighted"]
"""None; the mean of all; the last token's; a mean in which each token weighs as much as its place
from 1, as SGPT has it (Muennighoff, 2022, equation 2)."""

POOLINGS = tuple(name for name in get_args(Pooling) if name)


def pool_weights(pooling: Pooling, length: int) -> np.ndarray:
    """Returns the weight of each token of a text, float64 [length]; they sum to 1.

    Raises:
      NeoError: there is no such pooling.
    """
    if pooling not in POOLINGS:
        raise NeoError(f"no pooling is called '{pooling}'.{suggest(pooling, POOLINGS)}")
    weights = np.ones(length)
    if pooling == "last":
        weights = (np.arange(length) == length - 1).astype(float)
    if pooling == "weighted":
        weights = np.arange(1.0, length + 1)
    return weights / weights.sum()
