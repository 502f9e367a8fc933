"""Rounding of activations to the dtype in which they are multiplied or kept."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from neo_jax.axes import Array


def cast(x: Array, dtype: DTypeLike) -> Array:
    """Returns an array in a dtype; numbers too large for float16 become its largest, 65504.

    Infinite ones would become NaN in the next product or softmax; bfloat16 has float32's range.
    """
    if dtype == jnp.float16 and x.dtype != jnp.float16:
        largest = jnp.finfo(jnp.float16).max.astype(x.dtype)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype)
