"""Language modelling: the cross entropy of the next token, with a z-loss."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.model import scan
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import pick
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.streamed import blockwise_loss


class Batch(NamedTuple):
    """Sequences to learn from: token t predicts token t + 1."""

    tokens: Int[Array, "B T+1"]
    weights: Float[Array, "B T"]  # how much each prediction counts: 1, or 0 for padding
    # Where the document of each token begins, see `scan.hidden`.
    segment_starts: Int[Array, "B T"] | None = None
    features: Float[Array, "B I"] | None = None  # of what a prefix is made, where one is


@dataclasses.dataclass(frozen=True)
class NextToken:
    """The `Objective` of language models: -log p(next token) in nats, weighted."""

    z_loss: float = 0.0  # weight of log(sum(exp(logits)))^2, which keeps logits near 0 (Mesh-TF)

    def init(self, model: Neo, key: Array) -> Params:
        """Returns no parameters."""
        return {}

    def batch_spec(self, rows: int, length: int, has_segment_starts: bool) -> Batch:
        """Returns the shapes of a batch."""

        def shape(width: int, dtype: DTypeLike) -> Any:
            return jax.ShapeDtypeStruct((rows, width), dtype)

        starts = shape(length, jnp.int32) if has_segment_starts else None
        return Batch(shape(length + 1, jnp.int32), shape(length, jnp.float32), starts)

    def embed(
        self, model: Neo, params: Params, batch: Batch, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the first block reads of a batch."""
        return scan.embed(model, params, batch.tokens[:, :-1], batch.segment_starts, key)

    def loss(
        self,
        model: Neo,
        params: Params,
        batch: Batch,
        *,
        embedded: Float[Array, "B T D"] | None = None,
        key: Array | None = None,
        **options: Any,
    ) -> Sums:
        """Returns the sums of a batch; `loss` is the cross entropy alone."""
        if embedded is None:
            embedded = self.embed(model, params, batch, key)
        hidden = scan.hidden(model, params, embedded, batch.segment_starts, key=key, **options)
        objective, cross_entropy = blockwise_loss(
            functools.partial(_losses, self.z_loss),
            model,
            params[model.config.unembedding]["embedding"],
            hidden,
            (batch.tokens[:, 1:], batch.weights),
        )
        return Sums(cross_entropy, objective, jnp.sum(batch.weights))

    def evaluate(self, model: Neo, params: Params, batch: Batch) -> Sums:
        """Returns the sums of a batch without the z-loss."""
        return dataclasses.replace(self, z_loss=0.0).loss(model, params, batch)


def _losses(z_loss: float, logits: Array, targets: Array, weights: Array) -> tuple[Array, Array]:
    """Returns the objective and the cross entropy of some positions, summed."""
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    cross_entropy = jnp.sum(weights * (log_sum - pick(logits, targets)))
    return cross_entropy + z_loss * jnp.sum(weights * log_sum**2), cross_entropy
