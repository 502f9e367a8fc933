"""What a model declares of its parameters, known without a trace of all its layers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from neo_jax.axes import Params
from neo_jax.model.transformer import Neo, boxed_params


def param_shapes(model: Neo) -> Params:
    """Returns the parameter tree with a `ShapeDtypeStruct` in the place of each leaf, float32."""
    return _declared(model, lambda box: jax.ShapeDtypeStruct(box.value.shape, box.value.dtype))


def logical_axes(model: Neo) -> Params:
    """Returns the parameter tree with each leaf's tuple of logical axes in its place."""
    return _declared(model, lambda box: box.names)


def _declared(model: Neo, part: Callable[[Any], Any]) -> Params:
    """Returns the parameter tree with something of each leaf's declaration in its place.

    Layers differ in nothing that is declared, so one is traced, once for all that ask.
    """
    config = dataclasses.replace(model.config, num_layers=1, attention_types=("global",))
    boxed = _boxed(model.clone(config=config, sharding=None, kernel="auto"))
    tree = {name: boxed[name] for name in boxed if name != "h_0"}
    tree |= {f"h_{i}": boxed["h_0"] for i in range(model.config.num_layers)}
    return jax.tree.map(part, tree, is_leaf=nn.meta.is_axis_metadata)


@functools.lru_cache
def _boxed(model: Neo) -> Params:
    return jax.eval_shape(lambda: boxed_params(model, jax.random.key(0)))
