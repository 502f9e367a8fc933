"""From hidden states to losses and log-probabilities, a block of positions at a time.

The logits of a batch would be by far the largest array of a step. Only a block's exist at a time.
Both functions take a strategy's batch and table as they are laid out, each device the blocks of its
own rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.axes import BATCH, EMBED, VOCAB, Array, Float, Int
from neo_jax.model.transformer import Neo
from neo_jax.ops import tuning
from neo_jax.sharding.fsdp import EVERYWHERE, FsdpLayout, inside_share
from neo_jax.sharding.rules import constrain, pick

Loss = Callable[..., tuple[Array, Array]]
"""From logits, float32 [B, t, V], and arrays that lead with [B, t] to two sums over positions."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blockwise_loss(
    loss: Loss,
    model: Neo,
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    arrays: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Returns both sums of a loss over all positions; only the first has a gradient.

    A block's gradient is formed with its loss, so that the backward pass forms no logits again.

    The loss returns what is minimised and what is reported, summed, of the logits of the output
    head's table and ln_f's output, and of `arrays`, [B, T, ...], which get no gradient.
    """
    layout = _layout(model)

    def of_share(table: Array, *arrays: Array) -> tuple[Array, Array]:
        def add(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, _apply(loss, model, table, *block)), None

        zeros = jnp.zeros(()), jnp.zeros(())
        return layout.sum(jax.lax.scan(add, zeros, _blocks(model, *arrays))[0])

    return _mapped(model, of_share, EVERYWHERE, table, hidden, *arrays)


def _blockwise_forward(
    loss: Loss, model: Neo, table: Array, hidden: Array, arrays: tuple[Array, ...]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Returns both sums, and the gradients of the first by the table and the hidden states."""
    layout = _layout(model)

    def first(table: Array, *block: Array) -> tuple[Array, tuple[Array, Array]]:
        sums = _apply(loss, model, table, *block)
        return sums[0], sums

    grad = jax.grad(first, argnums=(0, 1), has_aux=True)

    def of_share(table: Array, *arrays: Array) -> tuple[Any, Any]:
        def add(carry: Any, block: tuple[Array, ...]) -> tuple[Any, Array]:
            (grad_table, grad_x), sums = grad(table, *block)
            return jax.tree.map(jnp.add, carry, (sums, grad_table)), grad_x

        zeros = (jnp.zeros(()), jnp.zeros(())), jnp.zeros_like(table)
        (sums, grad_table), grads_x = jax.lax.scan(add, zeros, _blocks(model, *arrays))
        return layout.sum(sums), (grad_table[None], _joined(grads_x, arrays[0].shape[1]))

    out = EVERYWHERE, (layout.by_share, layout.rows())
    sums, (grads_table, grad_x) = _mapped(model, of_share, out, table, hidden, *arrays)
    return sums, (layout.sum_parts(grads_table), grad_x)


def _blockwise_backward(
    loss: Loss, model: Neo, grads: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    grad_table, grad_x = grads
    return grad_table * cotangents[0], grad_x * cotangents[0], None


blockwise_loss.defvjp(_blockwise_forward, _blockwise_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_logprobs(
    model: Neo,
    table: Float[Array, "V D"],
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
    """Returns log p of a target behind each position, in nats, with its gradient.

    The backward pass forms the logits of each block again, so that any function of the result can
    be differentiated: preferences, policies, rewards. The table is that of the output head, the
    hidden states are ln_f's output.
    """

    def of_share(table: Array, *arrays: Array) -> Array:
        def one(none: None, block: tuple[Array, ...]) -> tuple[None, Array]:
            return None, _apply(_logprobs, model, table, *block)

        found = jax.lax.scan(one, None, _blocks(model, *arrays))[1]
        return _joined(found, arrays[0].shape[1])

    return _mapped(model, of_share, _layout(model).rows(), table, hidden, targets)


def _logprobs_forward(
    model: Neo, table: Array, hidden: Array, targets: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return token_logprobs(model, table, hidden, targets), (table, hidden, targets)


def _logprobs_backward(
    model: Neo, saved: tuple[Array, Array, Array], cotangent: Array
) -> tuple[Array, Array, None]:
    """The gradient is that of the sum of log-probabilities, each times its cotangent."""
    table, hidden, targets = saved
    arrays = targets, cotangent
    _, grads = _blockwise_forward(_weighted_logprobs, model, table, hidden, arrays)
    return *grads, None


token_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def _logprobs(logits: Array, targets: Array) -> Array:
    return pick(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


def _weighted_logprobs(logits: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    total = jnp.sum(weights * _logprobs(logits, targets))
    return total, total


def _layout(model: Neo) -> FsdpLayout:
    """Returns how the batch and the table of the output head are laid out."""
    return FsdpLayout.of(model.sharding, (VOCAB, EMBED))


def _mapped(model: Neo, function: Callable[..., Any], out: Any, table: Array, *rows: Array) -> Any:
    """Applies a function of the table and of rows to each device's share of these.

    The table is gathered in the dtype that products round it to, half the bytes, and is float32.
    """
    layout = _layout(model)
    gathered = layout.gather(table.astype(model.dtype)).astype(jnp.float32)
    takes = (EVERYWHERE, *[layout.rows()] * len(rows))
    hidden, *others = rows
    if not layout.length:  # what splits sequences then splits the vocabulary, or nothing does
        hidden = constrain(model.sharding, hidden, (BATCH, None, None), "ln_f's output")
    return layout.map_share(function, takes, out)(gathered, hidden, *others)


def _apply(function: Callable[..., Any], model: Neo, table: Array, x: Array, *arrays: Array) -> Any:
    """Applies a function of logits to a block of a device."""
    model = model.clone(sharding=inside_share(model.sharding, _layout(model)))
    logits = model.apply({"params": {model.config.unembedding: {"embedding": table}}}, x,
                         method=Neo.unembed)  # fmt: skip
    return function(logits, *arrays)


def _blocks(model: Neo, *arrays: Array) -> tuple[Array, ...]:
    """Cuts axis 1 of arrays into blocks, a new first axis; zeros fill the last."""
    rows, length = arrays[0].shape[:2]
    block = min(max(1, tuning.loss_tokens(model.sharding) // rows), length)
    count = -(-length // block)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape((x.shape[0], count, block, *x.shape[2:])), 1, 0)

    return tuple(map(cut, arrays))


def _joined(blocks: Array, length: int) -> Array:
    """Undoes `_blocks` for an array."""
    joined = jnp.moveaxis(blocks, 0, 1)
    return joined.reshape((joined.shape[0], -1, *blocks.shape[3:]))[:, :length]
