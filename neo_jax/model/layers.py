"""The only owners of parameters: `Einsum`, `Embed`, `LayerNorm`, and the one product they use.

Every product with a parameter, the tied output head included, goes through `einsum`. It alone
knows the dtype policy: operands in the compute dtype, sums in float32; and what kinds of weight
there are: arrays, and what stands in the place of one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, normal
from jax.typing import DTypeLike

from neo_jax.axes import EMBED, Array, Float, Int
from neo_jax.model.initializers import stddev
from neo_jax.model.low_rank import LowRank, low_rank_axes
from neo_jax.ops.embedding import embedding_lookup
from neo_jax.ops.int8 import Int8, multiply
from neo_jax.ops.matmul import matmul, repeat_vector
from neo_jax.sharding.fsdp import FsdpLayout, gather
from neo_jax.sharding.rules import Sharding

PRODUCT = "product"
"""What `jax.checkpoint` policies call the results of `einsum`."""


Weight = Array | LowRank | Int8
"""What a product takes as a parameter."""


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
    layout = FsdpLayout.of(sharding, axes)
    if not isinstance(weight, Int8):
        return matmul(x, weight, jnp.dtype(dtype), layout)
    values = layout.gather(weight.values)
    scale = gather(sharding, weight.scale, axes[: len(kept)], "a scale")
    return multiply(x, values, dtype) * repeat_vector(scale, x.shape[:2])


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
            y += repeat_vector(bias, x.shape[:2])
        return y


def linear(
    module: Any,
    name: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    bias: bool = True,
) -> Einsum:
    """Returns the linear map between logical axes that has this name in a layer.

    The module that it is for has fields config, dtype and sharding.
    """
    shape, init = map(module.config.size, outputs + inputs), normal(stddev(module.config, name))
    of_bias = outputs if bias else ()
    return Einsum(tuple(shape), outputs + inputs, init, of_bias, module.dtype, module.sharding)


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
        table, layout = self.embedding, FsdpLayout.of(self.sharding, (self.axis, EMBED))
        if not isinstance(table, Int8):
            return embedding_lookup(layout, table, ids).astype(jnp.float32)
        of_scale = FsdpLayout.of(self.sharding, (self.axis, None))
        scale = embedding_lookup(of_scale, table.scale[:, None], ids)
        return embedding_lookup(layout, table.values, ids).astype(jnp.float32) * scale

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
        rows, width = x.shape[:2], x.shape[-1:]
        scale = _vector(self, "scale", nn.initializers.ones, (EMBED,), width)
        bias = _vector(self, "bias", nn.initializers.zeros, (EMBED,), width)
        x = x.astype(jnp.float32)
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = jnp.square(centred).mean(axis=-1, keepdims=True)
        normalized = centred * jax.lax.rsqrt(variance + self.epsilon)
        return normalized * repeat_vector(scale, rows) + repeat_vector(bias, rows)


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
