"""Parameters as whole numbers of eight bits, and the product with them.

Symmetric and per output (as in Dettmers et al., "LLM.int8()", 2022, section 2.1, without their
outliers): the largest magnitude among the weights of an output becomes 127, all others are rounded
to the nearest step. Decoding reads every parameter at every step, so a quarter of the bytes of
float32 is up to four times the speed where memory is the limit.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from neo_jax.axes import Array, Float, Int
from neo_jax.ops.matmul import as_matrix, as_rows, product

LARGEST = 127
"""The largest magnitude of a whole number: -128 is not used, so that signs are alike."""

MOST_ROWS = 16 if jax.__version_info__ < (0, 12) else math.inf
"""Up to so many rows of activations CPUs multiply in whole numbers.

Beyond, the backend of jax 0.10 takes twice as long as in floats, that of 0.12 two thirds.
"""

_FINE = 254  # steps of the fine part of an activation within one of the coarse part


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A parameter, values x scale: a pytree that stands where the parameter's array does.

    In trees of other things than arrays its parts are such things.
    """

    values: Int[Array, "*weight"]  # int8 [outputs..., inputs...]
    scale: Float[Array, "*outputs"]  # float32, what a step is worth

    def dequantized(self) -> Float[Array, "*weight"]:
        """Returns the parameter, float32 [outputs..., inputs...]."""
        return self.values * for_each(self.scale, self.values.ndim)


def for_each(scale: Array, ndim: int) -> Array:
    """Returns a scale with axes of size 1 at its end, `ndim` in all."""
    return scale.reshape((*scale.shape, *[1] * (ndim - scale.ndim)))


def rounded(weight: Array, num_inputs: int) -> Int8:
    """Returns the nearest whole numbers for weights [outputs..., inputs...] of any float dtype.

    Args:
      weight: what is rounded; an output of zeros keeps them, by a scale of 0.
      num_inputs: how many axes at the end share a scale.
    """
    weight = weight.astype(jnp.float32)
    inputs = tuple(range(weight.ndim - num_inputs, weight.ndim))
    scale = jnp.abs(weight).max(axis=inputs) / LARGEST
    steps = for_each(jnp.where(scale > 0, scale, 1.0), weight.ndim)
    return Int8(jnp.round(weight / steps).astype(jnp.int8), scale)


def multiply(
    x: Float[Array, "B T *I"], values: Int[Array, "..."], dtype: DTypeLike
) -> Float[Array, "B T ..."]:
    """Multiplies activations by values [outputs..., inputs...]; returns float32 [B, T, outputs...].

    Whole numbers are exact in bfloat16 too.

    CPUs that multiplied rows in floats would write and read all weights as such at each step. They
    turn the rows into whole numbers instead: a coarse one, and a fine one for what is left,
    together within 1 / 64516 of the row's largest magnitude; their products and sums are exact.
    """
    in_floats = functools.partial(product, "bti,oi->bto", dtype=dtype)
    cpu = _in_whole_numbers if math.prod(x.shape[:2]) <= MOST_ROWS else in_floats
    rows, matrix = as_rows(x), as_matrix(values, x.ndim - 2)
    y = jax.lax.platform_dependent(rows, matrix, cpu=cpu, default=in_floats)
    return y.reshape((*x.shape[:2], *values.shape[: 2 - x.ndim]))


def _in_whole_numbers(x: Array, values: Array) -> Array:
    x = x.astype(jnp.float32)
    step = jnp.abs(x).max(axis=-1, keepdims=True) / LARGEST
    steps = x / jnp.where(step > 0, step, 1.0)
    coarse = jnp.round(steps)
    fine = jnp.round((steps - coarse) * _FINE)
    both = jnp.stack([coarse, fine]).astype(jnp.int8)
    y = jnp.einsum("pbti,oi->pbto", both, values, preferred_element_type=jnp.int32)
    coarse, fine = y.astype(jnp.float32)
    return step * (coarse + fine / _FINE)
