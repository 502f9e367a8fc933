"""Layers that are alike are traced once: a third of the time from a start to the first token."""

import functools
from typing import Any

import jax
from flax import linen as nn
from flax.linen import module as linen_module

from neo_jax.axes import Params


def call(layer: nn.Module, *args: Any) -> Any:
    """Returns what `layer(*args)` returns, for a bound module whose call takes arrays alone.

    The program is the same as without; `name` of the layer is in the names of its operations.
    Where parameters are drawn, outputs dropped, intermediates captured or methods intercepted, it
    is called as it is: these differ from layer to layer.
    """
    looked_at = layer.is_mutable_collection("intermediates") or _interceptors()
    if layer.is_initializing() or layer.has_rng("dropout") or looked_at:
        return layer(*args)
    alone = layer.clone(parent=None, name=None)  # equal for layers that are alike
    with jax.named_scope(str(layer.name)):
        return _apply(alone, layer.variables["params"], *args)


def _interceptors() -> bool:
    """Returns whether this is within `nn.intercept_methods`, of which flax tells nobody."""
    return bool(linen_module._global_interceptor_stack)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _apply(layer: nn.Module, params: Params, *args: Any) -> Any:
    return layer.apply({"params": params}, *args)
