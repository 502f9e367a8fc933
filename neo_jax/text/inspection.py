"""What a model computes of a text on its way: hidden states, and what its heads attend to."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.decode.capacity import padded_length, round_up
from neo_jax.decode.engine import check_tokens
from neo_jax.decode.pooling import POOLINGS, Pooling, pool_weights
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError, checked
from neo_jax.model.soft_prompt import soft_prompt_ids
from neo_jax.model.transformer import Neo, Output
from neo_jax.ops import tuning
from neo_jax.ops.attention import Mask
from neo_jax.ops.attention.dense import weights
from neo_jax.sharding.rules import padded_rows


def hidden_states(
    model: Neo,
    params: Params,
    texts: Sequence[Sequence[int]],
    layer: int,
    pooling: Pooling = "",
    normalize: bool = False,
) -> list[np.ndarray]:
    """Returns the hidden states [T, D] of each text, float32; those of like length in a batch.

    Pooled they are one vector [D] of each.

    Args:
      model: the model.
      params: its parameters.
      texts: ids, each within the context.
      layer: 0 is the embedding, i the output of block i, -1 the final LayerNorm's.
      pooling: how a text becomes one vector.
      normalize: divide each vector by its length.

    Raises:
      NeoError: no such layer, no such pooling, no such token, more of them than the context holds,
        or hidden states of tokens that are to be normalized.
    """
    layer, last = checked("layer", layer, int), model.config.num_layers
    if not -last - 1 <= layer <= last:
        raise NeoError(f"layer {layer} is not one of 0 to {last}, or -1.")
    if normalize and not pooling:
        raise NeoError(f"normalize goes with a pooling: {', '.join(POOLINGS)}.")
    for ids in texts:
        check_tokens(model, ids)
    found, lead = [np.empty(0)] * len(texts), model.soft_prompt
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        longest = lead + len(texts[order[0]])
        width = padded_length(longest, model.config.max_length)
        most = max(tuning.forward_tokens(model.sharding) // width, 1)
        batch, order = order[:most], order[most:]
        rows = _padded(model, [texts[i] for i in batch], width, round_up(len(batch), most))
        if pooling:
            weights = np.zeros(rows.shape, np.float32)
            for row, i in zip(weights, batch, strict=False):
                length = len(texts[i])
                row[lead : lead + length] = pool_weights(pooling, length)
            vectors = to_host(_pooled(model, layer, normalize, params, rows, weights))
            for i, vector in zip(batch, vectors, strict=False):
                found[i] = vector.copy()
            continue
        states = to_host(_hidden_states(model, layer, params, rows))
        for i, state in zip(batch, states, strict=False):
            found[i] = state[lead : lead + len(texts[i])].copy()  # without the padding
    return found


def attention(model: Neo, params: Params, ids: Sequence[int], layer: int) -> np.ndarray:
    """Returns what the heads of a layer attend to in a text, float32 [N, T, T].

    Entry [n, t, s] is the share that the value of token s has in what head n gives for token t: 0
    where t does not see s; over s they sum to 1. Tokens of a soft prompt come first.

    Args:
      model: the model.
      params: its parameters.
      ids: the text, within the context.
      layer: from 0.

    Raises:
      NeoError: as `hidden_states`.
    """
    layer = checked("layer", layer, int)
    if not 0 <= layer < model.config.num_layers:
        raise NeoError(f"layer {layer} is not one of 0 to {model.config.num_layers - 1}.")
    check_tokens(model, ids)
    length = model.soft_prompt + len(ids)
    width = padded_length(length, model.config.max_length)
    maps = _attention(model, layer, params, _padded(model, [ids], width, 1))
    return to_host(maps[0, :, :length, :length])


def _padded(model: Neo, texts: Sequence[Sequence[int]], width: int, size: int) -> np.ndarray:
    """Returns texts behind the soft prompt, at least `size` rows, padded on the right."""
    padded = np.zeros((padded_rows(model.sharding, size), width), np.int32)
    lead = soft_prompt_ids(model)
    for row, ids in zip(padded, texts, strict=False):
        row[: len(lead) + len(ids)] = [*lead, *ids]
    return padded


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hidden_states(
    model: Neo, layer: int, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    return model.apply({"params": params}, tokens).hidden_states[layer]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pooled(
    model: Neo,
    layer: int,
    normalize: bool,
    params: Params,
    tokens: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> Float[Array, "B D"]:
    states = _hidden_states(model, layer, params, tokens)
    vectors = jnp.sum(weights[..., None] * states, axis=1)
    if not normalize:
        return vectors
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attention(
    model: Neo, layer: int, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B N T T"]:
    output: Output = model.apply({"params": params}, tokens)
    read, sequence = output.hidden_states[layer], output.cache[layer]

    def of_layer(neo: Neo, x: Array) -> Array:
        return neo.h[layer].queries(x)

    queries = model.apply({"params": params}, read, method=of_layer)
    mask = Mask(sequence.positions, sequence.positions, model.config.window(layer))
    return weights(queries, sequence.k, mask)
