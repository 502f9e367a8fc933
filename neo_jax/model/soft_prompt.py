"""Embeddings that no word has, in the place of those of tokens: soft prompts and other prefixes.

A virtual token has a row in the table `prompt_embeddings` and an id from vocab_size on, so that
caches, schedulers and scores treat it as any other token; the output head ends at the vocabulary,
so no text ever holds one. A soft prompt (Lester et al., "The power of scale for parameter-efficient
prompt tuning", 2021) is such tokens before every text.
"""

from typing import TYPE_CHECKING

import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import normal

from neo_jax.axes import FEATURES, VIRTUAL, Array, Float, Int
from neo_jax.ops.embedding import embedding_lookup
from neo_jax.sharding.fsdp import FsdpLayout

if TYPE_CHECKING:
    from neo_jax.model.transformer import Neo

PROMPT = "prompt_embeddings"
"""The name of the table among the parameters."""


def declare_virtual(model: "Neo") -> Float[Array, "R D"] | None:
    """Declares the table of a model's virtual tokens; None if it has none, or is its head alone."""
    is_there = model.is_initializing() or model.has_variable("params", PROMPT)
    if not (model.virtual_tokens and is_there):
        return None
    init = nn.with_logical_partitioning(normal(0.02), (VIRTUAL, FEATURES))
    return model.param(PROMPT, init, (model.virtual_tokens, model.config.embed_dim))


def place_virtual(
    model: "Neo",
    x: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    prefix: Float[Array, "B K D"] | None = None,
) -> Float[Array, "B T D"]:
    """Returns embeddings with those of virtual tokens in their places.

    Args:
      model: what has the tokens.
      x: embeddings of tokens, whatever they are where tokens are virtual.
      tokens: their ids.
      prefix: what takes the first K places, whatever tokens are there.
    """
    table = model.prompt_embeddings
    if model.virtual_tokens:
        if table is None:
            raise ValueError(
                f"the parameters lack {PROMPT}, of {model.virtual_tokens} virtual tokens"
            )
        rows = tokens - model.config.vocab_size
        layout = FsdpLayout.of(model.sharding, (VIRTUAL, FEATURES))
        found = embedding_lookup(layout, table, rows).astype(x.dtype)
        x = jnp.where((rows >= 0)[..., None], found, x)
    if prefix is None:
        return x
    return jnp.concatenate([prefix.astype(x.dtype), x[:, prefix.shape[1] :]], axis=1)


def soft_prompt_ids(model: "Neo") -> list[int]:
    """Returns the ids that begin every text of a model."""
    first = model.config.vocab_size
    return list(range(first, first + model.soft_prompt))


def text_context(model: "Neo") -> int:
    """Returns how many tokens a text of a model has at most, next to its soft prompt."""
    return model.config.max_length - model.soft_prompt


def without_prompt(model: "Neo") -> "Neo":
    """Returns a model without its virtual tokens."""
    return model.clone(virtual_tokens=0, soft_prompt=0)
