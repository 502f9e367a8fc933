"""The objective: cross entropy of the next token, a block of positions at a time.

The logits of a batch would be by far the largest array of a step. A block's are formed, and turned
into its part of the gradients at once, so the backward pass need not form them again.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import EMBED, VOCAB, Array, Float, Int, Params
from neo_jax.model import scan
from neo_jax.model.scan import Remat
from neo_jax.model.transformer import Neo
from neo_jax.sharding.fsdp import EVERYWHERE, FsdpLayout, inside_fsdp
from neo_jax.sharding.rules import device_of, pick

# Of a device, whose logits exist at a time. Each block reads and writes the gradient of the table:
# no small part of a TPU's traffic, while small blocks cost a CPU nothing and spare its memory.
BLOCK_TOKENS, _CPU_BLOCK_TOKENS = 4096, 512


class Batch(NamedTuple):
    """Sequences to learn from: token t predicts token t + 1."""

    tokens: Int[Array, "B T+1"]
    weights: Float[Array, "B T"]  # how much each prediction counts: 1, or 0 for padding
    # Where the document of each token begins, see `scan.hidden`.
    segment_starts: Int[Array, "B T"] | None = None


class Losses(NamedTuple):
    """Sums over the predictions of a batch."""

    cross_entropy: Array  # -log p(next token), weighted, in nats
    objective: Array  # the same and the z-loss: what is minimised
    weight: Array  # of all predictions


def batch_losses(
    model: Neo,
    params: Params,
    batch: Batch,
    *,
    remat: Remat = "none",
    unroll: int = 1,
    z_loss: float = 0.0,
    key: Array | None = None,
    embedded: Float[Array, "B T D"] | None = None,
) -> Losses:
    """Returns the losses of a batch.

    Args:
      model: the model.
      params: stacked.
      batch: what to learn from.
      remat: see `neo_jax.model.scan.hidden`.
      unroll: likewise.
      z_loss: weight of log(sum(exp(logits)))^2, which keeps logits near 0 (Mesh-TensorFlow).
      key: for dropout.
      embedded: what `embed_inputs` returned, where that is known.
    """
    if embedded is None:
        embedded = embed_inputs(model, params, batch, key)
    options: Any = {"remat": remat, "unroll": unroll, "key": key}
    hidden = scan.hidden(model, params, embedded, batch.segment_starts, **options)
    objective, cross_entropy = _sums(
        _Head(model, z_loss),
        params[model.config.head]["embedding"],
        hidden,
        batch.tokens[:, 1:],
        batch.weights,
    )
    return Losses(cross_entropy, objective, jnp.sum(batch.weights))


def embed_inputs(
    model: Neo, params: Params, batch: Batch, key: Array | None = None
) -> Float[Array, "B T D"]:
    """Returns what the first block reads of a batch; params stacked, a key for dropout."""
    return scan.embed(model, params, batch.tokens[:, :-1], batch.segment_starts, key)


class _Head(NamedTuple):
    """From the last hidden states to losses, for a share of the batch."""

    model: Neo
    z_loss: float

    @property
    def layout(self) -> FsdpLayout:
        """How the batch and the table of the output head lie."""
        return FsdpLayout.of(self.model.sharding, (VOCAB, EMBED))

    def gathered(self, table: Array) -> Array:
        """Returns the whole table in float32, gathered in the dtype that products round it to."""
        return self.layout.gather(table.astype(self.model.dtype)).astype(jnp.float32)

    def losses(self, table: Array, x: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
        """Returns the objective and the cross entropy of some positions, summed."""
        model = self.model.clone(sharding=inside_fsdp(self.model.sharding))
        params = {model.config.head: {"embedding": table}}
        logits = model.apply({"params": params}, x, method=Neo.unembed)
        log_sum = jax.nn.logsumexp(logits, axis=-1)
        cross_entropy = jnp.sum(weights * (log_sum - pick(logits, targets)))
        return cross_entropy + self.z_loss * jnp.sum(weights * log_sum**2), cross_entropy


def _blocks(head: _Head, *arrays: Array) -> tuple[Array, ...]:
    """Cuts axis 1 of arrays into blocks, a new first axis; zeros fill the last."""
    on_cpu = device_of(head.model.sharding).platform == "cpu"
    tokens = min(BLOCK_TOKENS, _CPU_BLOCK_TOKENS) if on_cpu else BLOCK_TOKENS
    rows, length = arrays[0].shape[:2]
    block = min(max(1, tokens // rows), length)
    count = -(-length // block)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape((x.shape[0], count, block, *x.shape[2:])), 1, 0)

    return tuple(map(cut, arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    head: _Head, table: Array, x: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    """Returns the objective and the cross entropy; gradients are those of the objective."""
    layout = head.layout

    def of_share(table: Array, *arrays: Array) -> tuple[Array, Array]:
        def add(sums: tuple[Array, Array], block: tuple[Array, ...]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, head.losses(table, *block)), None

        zeros = jnp.zeros(()), jnp.zeros(())
        return layout.sum(jax.lax.scan(add, zeros, _blocks(head, *arrays))[0])

    rows, sums = layout.by_share, (EVERYWHERE, EVERYWHERE)
    function = layout.map_share(of_share, (EVERYWHERE, rows, rows, rows), sums)
    return function(head.gathered(table), x, targets, weights)


def _sums_forward(
    head: _Head, table: Array, x: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    layout = head.layout
    grad = jax.value_and_grad(head.losses, argnums=(0, 1), has_aux=True)

    def of_share(table: Array, x: Array, *arrays: Array) -> tuple[Any, Any]:
        def add(carry: Any, block: tuple[Array, ...]) -> tuple[Any, Array]:
            (objective, cross_entropy), (grad_table, grad_x) = grad(table, *block)
            return jax.tree.map(jnp.add, carry, (objective, cross_entropy, grad_table)), grad_x

        zeros = (jnp.zeros(()), jnp.zeros(()), jnp.zeros_like(table))
        (*sums, grad_table), grads_x = jax.lax.scan(add, zeros, _blocks(head, x, *arrays))
        grad_x = jnp.moveaxis(grads_x, 0, 1).reshape((x.shape[0], -1, *x.shape[2:]))
        return layout.sum(tuple(sums)), (grad_table[None], grad_x[:, : x.shape[1]])

    rows, whole = layout.by_share, EVERYWHERE
    function = layout.map_share(of_share, (whole, rows, rows, rows), ((whole, whole), (rows, rows)))
    sums, (grads_table, grad_x) = function(head.gathered(table), x, targets, weights)
    return sums, (layout.sum_parts(grads_table), grad_x)


def _sums_backward(
    head: _Head, grads: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    grad_table, grad_x = grads
    return grad_table * cotangents[0], grad_x * cotangents[0], None, None


_sums.defvjp(_sums_forward, _sums_backward)
