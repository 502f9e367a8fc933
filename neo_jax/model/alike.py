"""Layers that are alike are traced once: a third of the time from a start to the first token."""

import functools
from typing import Any

import jax
from flax import linen as nn

from neo_jax.axes import Params


def call(layer: nn.Module, *args: Any) -> Any:
    """Returns what `layer(*args)` returns, for a bound module whose call takes arrays alone.

    The program is the same as without; `name` of the layer is in the names of its operations.
    """
    if layer.is_initializing() or layer.has_rng("dropout"):  # what differs from layer to layer
        return layer(*args)
    alone = layer.clone(parent=None, name=None)  # equal for layers that are alike
    with jax.named_scope(str(layer.name)):
        return _apply(alone, layer.variables["params"], *args)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _apply(layer: nn.Module, params: Params, *args: Any) -> Any:
    return layer.apply({"params": params}, *args)
