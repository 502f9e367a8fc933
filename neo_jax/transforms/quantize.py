"""Models whose kernels and tables of tokens are whole numbers of eight bits: `Int8`.

LayerNorms, biases, the table of positions and a classifier's head, too small to be spared, stay as
they are.
"""

import functools

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import LABELS, VOCAB, Array, Params
from neo_jax.config import ModelConfig
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.ops.int8 import Int8, rounded
from neo_jax.sharding.rules import Sharding, constrain


def is_rounded(tensor: Tensor) -> bool:
    """Whether a parameter becomes whole numbers: a layer's kernel, or a table of tokens."""
    return (bool(tensor.num_inputs) and tensor.axes[0] != LABELS) or tensor.axes[0] == VOCAB


def is_quantized(params: Params) -> bool:
    """Returns whether any parameters are int8 weights."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Int8))
    return any(isinstance(leaf, Int8) for leaf in leaves)


def quantize_one(
    tensor: Tensor, array: Array, dtype: DTypeLike, sharding: Sharding | None = None
) -> Int8 | Array:
    """Returns what takes the place of a parameter in a model of whole numbers.

    What stays as it is gets `dtype`; the result is sharded as the array is.
    """
    if not is_rounded(tensor):
        return array.astype(dtype)
    return _rounded(array, tensor.num_inputs, tensor.axes, sharding)


def quantize(
    config: ModelConfig, params: Params, dtype: DTypeLike, sharding: Sharding | None = None
) -> Params:
    """Returns canonical parameters with an `Int8` in the place of each kernel and table of tokens.

    Parameters are of any float dtype; what stays as it is gets `dtype`.
    """
    leaves = flatten_dict(params)
    for tensor in tensors(config):
        leaves[tensor.path] = quantize_one(tensor, leaves[tensor.path], dtype, sharding)
    return unflatten_dict(leaves)


def quantized_shapes(
    config: ModelConfig, dtype: DTypeLike, sharding: Sharding | None = None
) -> Params:
    """Returns the shapes of what `quantize` gives, and with a strategy the places."""
    leaves = {}
    for tensor in tensors(config):
        whole = jax.ShapeDtypeStruct(tensor.shape, dtype)
        parts = jax.eval_shape(functools.partial(quantize_one, tensor, dtype=dtype), whole)

        def put(part: jax.ShapeDtypeStruct, tensor: Tensor = tensor) -> jax.ShapeDtypeStruct:
            axes = tensor.axes[: part.ndim]
            place = sharding.named(axes, part.shape, "an int8 weight") if sharding else None
            return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=place)

        leaves[tensor.path] = jax.tree.map(put, parts)
    return unflatten_dict(leaves)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(
    array: Array, num_inputs: int, axes: tuple[str, ...], sharding: Sharding | None
) -> Int8:
    """Rounds a kernel, or a table, whose rows are outputs."""
    weight = rounded(array, num_inputs or 1)
    outputs = axes[: weight.scale.ndim]
    return Int8(
        constrain(sharding, weight.values, axes, "an int8 weight"),
        constrain(sharding, weight.scale, outputs, "its scale"),
    )
