"""The only owners of parameters: `Einsum`, `Embed`, `LayerNorm`, and the one product they use.

Every product with a parameter, the tied output head included, goes through `einsum`. It alone
knows the dtype policy: operands in the compute dtype, sums in float32; and what kinds of weight
there are: arrays, and what stands in the place of one.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from neo_jax.axes import EMBED, Array, Float, Int
from neo_jax.ops import int8
from neo_jax.ops.int8 import Int8
from neo_jax.sharding.fsdp import FsdpLayout, embedding_lookup, gather
from neo_jax.sharding.rules import Sharding

PRODUCT = "product"
"""What `jax.checkpoint` policies call the results of `einsum`."""


_FEW = 16  # tokens a row up to which bfloat16 products have the form of decoding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """A kernel and what was learned beside it, x W + scale (x A) B: LoRA (Hu et al., 2021).

    A pytree that stands where the kernel's array does; in a stacked tree all parts lead with the
    number of units. The weight comes first: it is the leaf whose shape Flax checks.
    """

    weight: Any  # an array [outputs..., inputs...]; in trees of other things one of these
    a: Any  # [rank, inputs...]
    b: Any  # [outputs..., rank]
    scale: float = dataclasses.field(metadata={"static": True})

    def merged(self) -> Array:
        """Returns the one array that does the same, weight + scale b a in float32."""
        product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        for _ in range(self.a.ndim + self.b.ndim - 2 - self.weight.ndim):  # stacked
            product = jax.vmap(product)
        change = product(self.b.astype(jnp.float32), self.a.astype(jnp.float32))
        return self.weight.astype(jnp.float32) + self.scale * change


Weight = Array | LowRank | Int8
"""What a product takes as a parameter."""


def low_rank_axes(
    axes: Sequence[str | None], num_inputs: int
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Returns the logical axes of the a and the b of a `LowRank`, by those of its weight."""
    return (None, *axes[-num_inputs:]), (*axes[:-num_inputs], None)


def einsum(
    equation: str,
    x: Array,
    weight: Weight,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
    axes: Sequence[str | None] = (),
) -> Array:
    """Multiplies activations by a parameter.

    Where the strategy splits the parameter over devices that also split the batch, each gathers it
    as it is needed, in `dtype`, once in the forward and once in the backward pass, and has its part
    of the gradient's sum, in float32.

    Args:
      equation: "x,weight->output" in the letters of `neo_jax.axes`. The letters that are summed
        over come last in x and in the weight; in the output the weight's others take their place:
        "btd,nhd->btnh", "btnh,dnh->btd", "btd,vd->btv".
      x: activations of any float dtype.
      weight: a parameter of any float dtype, or what stands in its place.
      dtype: what both operands are cast to. float32 means float32: products at full precision
        on every device, where TPUs would otherwise round operands to bfloat16.
      sharding: the strategy.
      axes: the logical axes of the weight, which the strategy speaks of.

    Returns:
      The product in float32, its sums accumulated in float32. Gradients are formed likewise,
      from operands in `dtype`; the weight's gradient stays float32.
    """
    return checkpoint_name(_einsum(equation, x, weight, dtype, sharding, axes), PRODUCT)


def _einsum(
    equation: str,
    x: Array,
    weight: Weight,
    dtype: DTypeLike,
    sharding: Sharding | None,
    axes: Sequence[str | None],
) -> Array:
    operands, _, output = equation.partition("->")
    x_axes, _, weight_axes = operands.partition(",")
    summed = "".join(axis for axis in x_axes if axis in weight_axes)
    kept = weight_axes.replace(summed, "")
    rows = x_axes.removesuffix(summed)
    if not summed or (x_axes, weight_axes, output) != (rows + summed, kept + summed, rows + kept):
        raise ValueError(f"'{equation}' is not a product of activations and a parameter")
    if isinstance(weight, LowRank):
        a_axes, b_axes = low_rank_axes(axes, len(summed)) if axes else ((), ())
        y = _einsum(equation, x, weight.weight, dtype, sharding, axes)
        low = _einsum(f"{x_axes},r{summed}->{rows}r", x, weight.a, dtype, sharding, a_axes)
        high = _einsum(f"{rows}r,{kept}r->{output}", low, weight.b, dtype, sharding, b_axes)
        return y + weight.scale * high
    axes = axes or [None] * len(weight_axes)
    if isinstance(weight, Int8):
        return _einsum_int8(x, weight, dtype, sharding, axes)
    product = _Product(len(summed), jnp.dtype(dtype), FsdpLayout.of(sharding, axes))
    return _multiply(product, x, weight)


def _einsum_int8(
    x: Array, weight: Int8, dtype: DTypeLike, sharding: Sharding | None, axes: Sequence[str | None]
) -> Array:
    """Multiplies by whole numbers, which travel as such; then by what a step of each is worth."""
    values = FsdpLayout.of(sharding, axes).gather(weight.values)
    outputs = values.shape[: weight.scale.ndim]
    scale = gather(sharding, weight.scale, axes[: weight.scale.ndim], "a scale")
    y = int8.multiply(_rows(x), values.reshape((math.prod(outputs), -1)), dtype)
    return y.reshape((*x.shape[:2], *outputs)) * _for_each_row(scale, x.shape[:2])


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product of activations, [B, T, inputs...], and a parameter."""

    num_inputs: int  # axes of the parameter, the last ones, that are summed over
    dtype: np.dtype
    layout: FsdpLayout

    def forward(self, x: Array, weight: Array) -> Array:
        weight = self.layout.gather(weight.astype(self.dtype))
        matrix = self._matrix(weight)
        if x.shape[1] <= (1 if self.dtype == jnp.float32 else _FEW):
            y = self._appended(_rows(x).reshape((-1, matrix.shape[1])), matrix)
        else:
            y = self._einsum("bti,oi->bto", _rows(x), matrix)
        return y.reshape((*x.shape[:2], *weight.shape[: -self.num_inputs]))

    def _appended(self, rows: Array, matrix: Array) -> Array:
        """The product of few tokens, as decoding has it: [rows, inputs] to [rows, outputs].

        In this form XLA's CPU backend reads bfloat16 weights as they are. With another axis of rows
        it keeps a transposed copy of all, and for a single row one in float32. Which is fastest of
        the forms of float32 depends on the rows (`benchmarks/product_forms.py`).
        """
        plain = functools.partial(self._einsum, "bi,oi->bo")
        if self.dtype == jnp.bfloat16:
            return plain(rows, matrix) if len(rows) > 1 else plain(_twice(rows), matrix)[:1]
        on_cpu = self._turned if len(rows) > 1 else self._halved
        return jax.lax.platform_dependent(rows, matrix, cpu=on_cpu, default=plain)

    def _turned(self, rows: Array, matrix: Array) -> Array:
        """The same with the weights on the left, an eighth faster on CPUs.

        Their backend copies the right operand into another order before it multiplies. Without the
        barrier XLA would turn the product back.
        """
        y = self._einsum("oi,bi->ob", matrix, rows)
        return jax.lax.optimization_barrier(y).T

    def _halved(self, row: Array, matrix: Array) -> Array:
        """The product of one row as two: CPUs read a tenth faster, as fast as they can.

        Where devices share the outputs, halving them would move some.
        """
        if not self.layout.is_single or len(matrix) % 2:
            return self._einsum("bi,oi->bo", row, matrix)
        halves = matrix.reshape((2, -1, matrix.shape[1]))
        return self._einsum("hi,hoi->ho", _twice(row), halves).reshape((1, -1))

    def backward(self, x: Array, weight: Array, grad: Array) -> tuple[Array, Array]:
        matrix = self._matrix(self.layout.gather(weight.astype(self.dtype)))
        grad_x = self._einsum("bto,oi->bti", _rows(grad), matrix).reshape(x.shape)
        inputs = range(weight.ndim)[-self.num_inputs :]
        return grad_x, self.layout.gradient(self._outer, x, grad, inputs)

    def _outer(self, x: Array, grad: Array) -> Array:
        """Returns the gradient of the weight, for some rows."""
        matrix = self._einsum("bto,bti->oi", _rows(grad), _rows(x))
        return matrix.reshape((*grad.shape[2:], *x.shape[2:]))

    def _matrix(self, weight: Array) -> Array:
        # One matrix: XLA's CPU backend is several times slower on a product with more axes.
        return weight.reshape((math.prod(weight.shape[: -self.num_inputs]), -1))

    def _einsum(self, equation: str, x: Array, y: Array) -> Array:
        return jnp.einsum(
            equation,
            x.astype(self.dtype),
            y.astype(self.dtype),
            precision=jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )


def _twice(row: Array) -> Array:
    return jnp.concatenate([row, row])


def _rows(x: Array) -> Array:
    return x.reshape((*x.shape[:2], -1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(product: _Product, x: Array, weight: Array) -> Array:
    return product.forward(x, weight)


def _multiply_forward(
    product: _Product, x: Array, weight: Array
) -> tuple[Array, tuple[Array, Array, Array | np.ndarray]]:
    # Keeping the operand as it was multiplied halves the memory of a bfloat16 step.
    saved = (x.astype(product.dtype), weight, jnp.zeros((), x.dtype))
    return _multiply(product, x, weight), saved


def _multiply_backward(
    product: _Product, saved: tuple[Array, Array, Array | np.ndarray], grad: Array | np.ndarray
) -> tuple[Array, Array]:
    x, weight, like_x = saved
    grad_x, grad_weight = product.backward(x, weight, jnp.asarray(grad))
    return grad_x.astype(like_x.dtype), grad_weight.astype(weight.dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)


class Einsum(nn.Module):
    """A linear map with a kernel of any rank, and a bias over the output's last axes."""

    shape: Sequence[int]
    axes: Sequence[str]
    kernel_init: Initializer
    bias_axes: Sequence[str] = ()
    dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    @nn.compact
    def __call__(self, equation: str, x: Array) -> Array:
        """Returns einsum(equation, x, kernel) + bias, in float32."""
        kernel = _declared(self, "kernel", self.kernel_init, self.axes, self.shape)
        y = einsum(equation, x, kernel, self.dtype, self.sharding, self.axes)
        if self.bias_axes:
            shape = [self.shape[self.axes.index(axis)] for axis in self.bias_axes]
            bias = _vector(self, "bias", nn.initializers.zeros, self.bias_axes, shape)
            y += _for_each_row(bias, x.shape[:2])
        return y


class Embed(nn.Module):
    """A table of rows: looked up by id, and as the tied output head multiplied by."""

    num_rows: int
    embed_dim: int
    axis: str
    embedding_init: Initializer
    dtype: DTypeLike = jnp.float32
    sharding: Sharding | None = None

    def setup(self) -> None:
        """Declares the table, [rows, D]."""
        shape = (self.num_rows, self.embed_dim)
        self.embedding = _declared(
            self, "embedding", self.embedding_init, (self.axis, EMBED), shape
        )

    def __call__(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Looks up rows, in float32. Ids outside the table take its first or last row."""
        table, scale = self.embedding, None
        if isinstance(table, Int8):
            layout = FsdpLayout.of(self.sharding, (self.axis, None))
            table, scale = table.values, embedding_lookup(layout, table.scale[:, None], ids)
        layout = FsdpLayout.of(self.sharding, (self.axis, EMBED))
        rows = embedding_lookup(layout, table, ids).astype(jnp.float32)
        return rows if scale is None else rows * scale

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Multiplies by the table's transpose: output logits, in float32."""
        axes = (self.axis, EMBED)
        return einsum("btd,vd->btv", x, self.embedding, self.dtype, self.sharding, axes)


class LayerNorm(nn.Module):
    """Normalises the last axis to mean 0 and (biased) variance 1 in float32; scales and shifts.

    Ba, Kiros and Hinton, "Layer Normalization", 2016, equation 4.
    """

    epsilon: float
    sharding: Sharding | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the normalised activations, in float32."""
        width = (x.shape[-1],)
        scale = _vector(self, "scale", nn.initializers.ones, (EMBED,), width)
        bias = _vector(self, "bias", nn.initializers.zeros, (EMBED,), width)
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normalized = centred * jax.lax.rsqrt(variance + self.epsilon)
        return normalized * _for_each_row(scale, x.shape[:2]) + _for_each_row(bias, x.shape[:2])


def _for_each_row(vector: Array, rows: tuple[int, ...]) -> Array:
    """Repeats a parameter along new first axes, in float32."""
    return _repeated(rows, vector.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _repeated(rows: tuple[int, ...], vector: Array) -> Array:
    return jnp.broadcast_to(vector, (*rows, *vector.shape))


def _repeated_backward(rows: tuple[int, ...], _: None, grad: Array) -> tuple[Array]:
    # A product with ones: XLA's CPU backend is many times slower on the sum itself.
    num_rows = math.prod(rows)
    ones, highest = jnp.ones(num_rows, jnp.float32), jax.lax.Precision.HIGHEST
    total = jnp.einsum("i,io->o", ones, grad.reshape((num_rows, -1)), precision=highest)
    return (total.reshape(grad.shape[len(rows) :]),)


_repeated.defvjp(lambda rows, vector: (_repeated(rows, vector), None), _repeated_backward)


def _declared(
    module: Einsum | Embed | LayerNorm,
    name: str,
    init: Initializer,
    axes: Sequence[str],
    shape: Sequence[int],
) -> Any:
    """Declares a parameter with its logical axes; returns it as it is stored."""
    return module.param(name, nn.with_logical_partitioning(init, tuple(axes)), tuple(shape))


def _vector(
    module: Einsum | LayerNorm,
    name: str,
    init: Initializer,
    axes: Sequence[str],
    shape: Sequence[int],
) -> Array:
    """Declares a parameter that is too small to be spared; returns it whole."""
    vector = _declared(module, name, init, axes, shape)
    return gather(module.sharding, vector, axes, "/".join((*module.path, name)))
