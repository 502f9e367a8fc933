"""The product of activations and a parameter, in the forms that each platform computes fast.

Operands are rounded to a dtype, sums are float32. A parameter that is sharded over the devices of
the batch is gathered in that dtype, and its gradient is reduced to where it is stored, in float32.
"""

import functools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from neo_jax.axes import Array, Float
from neo_jax.ops.rounding import cast
from neo_jax.sharding.fsdp import FsdpLayout

Tree = TypeVar("Tree")

_Saved = tuple[Array, Array, Array | np.ndarray]

_FEW = 16  # tokens a row up to which bfloat16 products have the form of decoding


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: Float[Array, "B T *I"], weight: Float[Array, "..."], dtype: np.dtype, layout: FsdpLayout
) -> Float[Array, "B T ..."]:
    """Multiplies activations by a parameter.

    Args:
      x: [B, T, inputs...] of any float dtype.
      weight: [outputs..., inputs...] of any float dtype.
      dtype: what both are cast to. float32 means products at full precision on every device, where
        TPUs would otherwise round operands to bfloat16.
      layout: how the weight is stored; each device gathers it as it needs it.

    Returns:
      float32 [B, T, outputs...]. Gradients are formed likewise, from operands in `dtype`; the
      weight's is reduced in float32.
    """
    weight = layout.gather(cast(weight, dtype))
    matrix = as_matrix(weight, x.ndim - 2)
    if x.shape[1] <= (1 if dtype == jnp.float32 else _FEW):
        y = few_rows(as_rows(x).reshape((-1, matrix.shape[1])), matrix, dtype, layout.is_single)
    else:
        y = product("bti,oi->bto", as_rows(x), matrix, dtype)
    return y.reshape((*x.shape[:2], *weight.shape[: 2 - x.ndim]))


def _forward(x: Array, weight: Array, dtype: np.dtype, layout: FsdpLayout) -> tuple[Array, _Saved]:
    # Keeping the operand as it was multiplied halves the memory of a bfloat16 step.
    saved = (cast(x, dtype), weight, jnp.zeros((), x.dtype))
    return matmul(x, weight, dtype, layout), saved


def _backward(
    dtype: np.dtype, layout: FsdpLayout, saved: _Saved, grad: Array | np.ndarray
) -> tuple[Array, Array]:
    x, weight, like_x = saved
    grad, num_inputs = settled(cast(jnp.asarray(grad), dtype)), x.ndim - 2
    matrix = as_matrix(layout.gather(cast(weight, dtype)), num_inputs)
    grad_x = product("bto,oi->bti", as_rows(grad), matrix, dtype).reshape(x.shape)
    of_rows, inputs = functools.partial(_of_rows, dtype), range(weight.ndim)[-num_inputs:]
    grad_weight = layout.gradient(of_rows, x, grad, inputs)
    return grad_x.astype(like_x.dtype), grad_weight.astype(weight.dtype)


def _of_rows(dtype: np.dtype, x: Array, grad: Array) -> Array:
    """Returns the gradient of a parameter for some rows of this device, in its shape."""
    # Of tokens as one axis: for a sum over two XLA's CPU backend first lays `grad` out anew.
    grads, inputs = (as_rows(each).reshape((-1, each[0, 0].size)) for each in (grad, x))
    matrix = product("to,ti->oi", grads, inputs, dtype)
    return matrix.reshape((*grad.shape[2:], *x.shape[2:]))


matmul.defvjp(_forward, _backward)


def few_rows(
    rows: Float[Array, "B I"], matrix: Float[Array, "O I"], dtype: np.dtype, is_single: bool
) -> Float[Array, "B O"]:
    """Multiplies the few tokens of a step of decoding by a matrix.

    In this form XLA's CPU backend reads bfloat16 weights as they are. With another axis of rows it
    keeps a transposed copy of all, and for a single row one in float32. Which is fastest of the
    forms of float32 depends on the rows (`benchmarks/product_forms.py`).
    """
    plain = functools.partial(product, "bi,oi->bo", dtype=dtype)
    if dtype == jnp.bfloat16:
        return plain(rows, matrix) if len(rows) > 1 else plain(_twice(rows), matrix)[:1]
    on_cpu = turned if len(rows) > 1 else functools.partial(halved, is_single=is_single)
    on_cpu = functools.partial(on_cpu, dtype=dtype)
    return jax.lax.platform_dependent(rows, matrix, cpu=on_cpu, default=plain)


def turned(
    rows: Float[Array, "B I"], matrix: Float[Array, "O I"], dtype: np.dtype
) -> Float[Array, "B O"]:
    """The same with the weights on the left, an eighth faster on CPUs.

    Their backend copies the right operand into another order before it multiplies. Without the
    barrier XLA would turn the product back.
    """
    y = product("oi,bi->ob", matrix, rows, dtype)
    return jax.lax.optimization_barrier(y).T


def halved(
    row: Float[Array, "1 I"], matrix: Float[Array, "O I"], dtype: np.dtype, is_single: bool
) -> Float[Array, "1 O"]:
    """The product of one row as two: CPUs read a tenth faster, as fast as they can.

    Where devices share the outputs, halving them would move some.
    """
    if not is_single or len(matrix) % 2:
        return product("bi,oi->bo", row, matrix, dtype)
    halves = matrix.reshape((2, -1, matrix.shape[1]))
    return product("hi,hoi->ho", _twice(row), halves, dtype).reshape((1, -1))


@jax.custom_vjp
def settled_gradient(x: Array) -> Array:
    """Returns an array as it is; its gradient is `settled`."""
    return x


settled_gradient.defvjp(lambda x: (x, None), lambda _, grad: (settled(grad),))


def settled(x: Tree) -> Tree:
    """Returns a tree of arrays that CPUs compute once, before any is used.

    XLA would compute it again for each of its users, and for one that reads it transposed slowly: a
    quarter of a training step in float32.
    """
    barrier = jax.lax.optimization_barrier
    return jax.lax.platform_dependent(x, cpu=barrier, default=lambda x: x)


def product(equation: str, x: Array, y: Array, dtype: DTypeLike) -> Array:
    """Returns an einsum of operands in a dtype: float32, its sums in float32."""
    return jnp.einsum(
        equation,
        cast(x, dtype),
        cast(y, dtype),
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _twice(row: Array) -> Array:
    return jnp.concatenate([row, row])


def as_rows(x: Array) -> Array:
    """Returns [B, T, inputs...] as [B, T, I]."""
    return x.reshape((*x.shape[:2], -1))


def as_matrix(weight: Array, num_inputs: int) -> Array:
    """Returns [outputs..., inputs...] as [O, I]: with more axes XLA's CPU backend is far slower."""
    return weight.reshape((math.prod(weight.shape[:-num_inputs]), -1))


def repeat_vector(vector: Float[Array, "..."], rows: tuple[int, ...]) -> Float[Array, "..."]:
    """Repeats a bias or a scale along new first axes of these sizes, in float32."""
    return _repeat(vector.astype(jnp.float32), rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _repeat(vector: Array, rows: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(vector, (*rows, *vector.shape))


def _repeat_backward(rows: tuple[int, ...], _: None, grad: Array) -> tuple[Array]:
    # A product with ones: XLA's CPU backend is many times slower on the sum itself.
    # Of rows and lengths as they are: made one axis they could not both be split over a mesh.
    ones, flat = jnp.ones(rows, jnp.float32), grad.reshape((*rows, -1))
    total = jnp.einsum("bt,bto->o", ones, flat, precision=jax.lax.Precision.HIGHEST)
    return (total.reshape(grad.shape[len(rows) :]),)


_repeat.defvjp(lambda vector, rows: (_repeat(vector, rows), None), _repeat_backward)
