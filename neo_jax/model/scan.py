"""Training's form of a model: layers stacked, so that the program does not grow with the depth.

The canonical tree has a sub-tree for each layer, h_0, h_1, ... Stacked, it has one for each
position in the smallest repeating unit of attention types, unit_0, unit_1, ..., whose leaves lead
with the number of units. `hidden` scans over these. (A tree for each position: a single one, with
an axis for the position, makes the backward pass much slower.) A pattern that does not repeat is
one unit.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from neo_jax import axes
from neo_jax.axes import Array, Float, Int, Params
from neo_jax.config import ModelConfig
from neo_jax.labels import CLASSIFIERS
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.layers import PRODUCT
from neo_jax.model.prefix_mapper import MAPPER
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.transformer import RESIDUAL_STREAM, Neo, make_block
from neo_jax.sharding.rules import constrain, tree_shardings

Remat = Literal["none", "products", "full"]
"""What the backward pass computes again: nothing; all but products with weights; all of a layer."""


def stack(params: Params, config: ModelConfig) -> Params:
    """Returns the stacked form of canonical parameters."""
    return _stack(params, config, lambda *layers: jnp.stack(layers))


def unstack(params: Params, config: ModelConfig) -> Params:
    """Returns the canonical form of stacked parameters."""
    unit = len(config.attention_types)
    layers = {
        f"h_{i}": jax.tree.map(lambda leaf, n=i // unit: leaf[n], params[f"unit_{i % unit}"])
        for i in range(config.num_layers)
    }
    return _outside(params) | layers


def stacked_axes(model: Neo) -> Params:
    """Returns the stacked tree with each leaf's tuple of logical axes in its place."""
    return _stack(logical_axes(model), model.config, lambda first, *_: (axes.LAYERS, *first))


def stacked_shapes(model: Neo) -> Params:
    """Returns the stacked tree with a `ShapeDtypeStruct` in the place of each leaf, float32."""

    def join(*layers: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype)

    return _stack(param_shapes(model), model.config, join)


def abstract_params(model: Neo, dtype: DTypeLike = jnp.float32) -> Params:
    """Returns the shape, dtype and place of every stacked parameter, each a `ShapeDtypeStruct`."""
    shapes = stacked_shapes(model)
    if model.sharding is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        shapes,
        tree_shardings(model.sharding, stacked_axes(model), shapes),
    )


def _stack(tree: Params, config: ModelConfig, join: Callable[..., Any]) -> Params:
    unit = len(config.attention_types)
    stacked = _outside(tree)
    for position in range(unit):
        layers = [tree[f"h_{i}"] for i in range(position, config.num_layers, unit)]
        # Leaves are arrays, or tuples of axes.
        stacked[f"unit_{position}"] = jax.tree.map(
            join, *layers, is_leaf=lambda node: isinstance(node, tuple)
        )
    return stacked


def _outside(tree: Params) -> Params:
    """Returns what belongs to no layer."""
    return {name: tree[name] for name in _OUTSIDE if name in tree}


_OUTSIDE = ("wte", "wpe", "ln_f", "lm_head", PROMPT, MAPPER, *CLASSIFIERS)


def embed(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    segment_starts: Int[Array, "B T"] | None = None,
    key: Array | None = None,
    prefix: Float[Array, "B K D"] | None = None,
) -> Float[Array, "B T D"]:
    """Returns what the first block reads, of stacked parameters; of a prefix see `Neo`.

    `segment_starts` are for each token the index in its row at which its document begins: learned
    positions count from there; None stands for rows of one document. Without a key for dropout
    nothing is dropped.
    """
    rngs = None if key is None else {"dropout": jax.random.fold_in(key, model.config.num_layers)}
    learned = _indices(tokens) if segment_starts is None else _indices(tokens) - segment_starts
    return model.apply({"params": params}, tokens, learned, prefix, method=Neo.embed, rngs=rngs)[0]


def hidden(
    model: Neo,
    params: Params,
    x: Float[Array, "B T D"],
    segment_starts: Int[Array, "B T"] | None = None,
    *,
    remat: Remat = "none",
    unroll: int = 1,
    key: Array | None = None,
) -> Float[Array, "B T D"]:
    """Returns ln_f's output for whole sequences, as `Neo.hidden` does for canonical parameters.

    Args:
      model: the model.
      params: stacked.
      x: what `embed` returned.
      segment_starts: as for `embed`; a token sees nothing before its document.
      remat: what the backward pass computes again.
      unroll: how many units of the pattern the program writes out before it loops.
      key: for dropout; None drops nothing.
    """
    config = model.config
    unit = len(config.attention_types)
    index = _indices(x[..., 0])

    def layer(position: int, x: Array, params: Params, number: Array) -> Array:
        x = constrain(model.sharding, x, RESIDUAL_STREAM, "the residual stream")
        rngs = None if key is None else {"dropout": jax.random.fold_in(key, number)}
        block = make_block(model, position)
        return block.apply({"params": params}, x, index, None, segment_starts, rngs=rngs)[0]

    if remat != "none":
        products = jax.checkpoint_policies.save_only_these_names(PRODUCT)
        policy = products if remat == "products" else None
        layer = jax.checkpoint(layer, policy=policy, static_argnums=0)

    def one_unit(x: Array, layers: tuple[list[Params], Array]) -> tuple[Array, None]:
        trees, number = layers
        for position, tree in enumerate(trees):
            x = layer(position, x, tree, number * unit + position)
        return x, None

    trees = [params[f"unit_{position}"] for position in range(unit)]
    numbers = jnp.arange(config.num_layers // unit)
    x, _ = jax.lax.scan(one_unit, x, (trees, numbers), unroll=min(unroll, len(numbers)))
    return model.apply({"params": params}, x, method=lambda neo, x: neo.ln_f(x))


def _indices(rows: Array) -> Array:
    return jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
