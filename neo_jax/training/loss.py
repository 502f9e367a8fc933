"""The objective: cross entropy of the next token."""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.model import Neo


class Batch(NamedTuple):
    """Sequences to learn from: token t predicts token t + 1."""

    tokens: Int[Array, "B T+1"]
    weights: Float[Array, "B T"]  # how much each prediction counts: 1, or 0 for padding


def loss_sum(model: Neo, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Returns the weighted sum of -log p(next token), in nats, and the sum of the weights."""
    variables = {"params": params}
    hidden, _ = model.apply(variables, batch.tokens[:, :-1], method=Neo.encode)
    logits = model.apply(variables, hidden, method=Neo.unembed)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.tokens[:, 1:])
    return jnp.sum(losses * batch.weights), jnp.sum(batch.weights)


def mean_loss(model: Neo, params: Params, batch: Batch) -> Array:
    """Returns the mean loss of a token, in nats."""
    total, weight = loss_sum(model, params, batch)
    return total / jnp.maximum(weight, 1)
