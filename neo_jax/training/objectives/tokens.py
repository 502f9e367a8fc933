"""Heads that read every token: labels of words, and the ends of answers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float, Params
from neo_jax.model.heads import head_logits
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import pick
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.classification import Batch, Classification


@dataclasses.dataclass(frozen=True)
class TokenClassification(Classification):
    """The `Objective` of a head `classifier`: the cross entropy of each label of a token, in nats.

    As transformers' ...ForTokenClassification has it: the mean is over the labels of a batch, and
    where there is a key for dropout `head.dropout` of what the head reads is dropped too.
    """

    def _label_spec(self, rows: int, length: int) -> Any:
        return jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def _logits(
        self, model: Neo, params: Params, batch: Batch, hidden: Float[Array, "B T D"], key: Any
    ) -> Float[Array, "B T C"]:
        if key is not None and self.head.dropout:
            key = jax.random.fold_in(key, model.config.num_layers + 1)  # no layer has this one
            kept = jax.random.bernoulli(key, 1 - self.head.dropout, hidden.shape)
            hidden = jnp.where(kept, hidden / (1 - self.head.dropout), 0)
        return head_logits(model, params, hidden)

    def sums(self, logits: Float[Array, "B T C"], batch: Batch) -> Sums:
        """Returns the sums of a batch of these logits, a label a unit of weight."""
        weights = batch.weights[:, None] * (batch.labels >= 0)
        losses = jax.nn.logsumexp(logits, axis=-1) - pick(logits, batch.labels)
        total = jnp.sum(weights * losses)
        return Sums(total, total, jnp.sum(weights))


@dataclasses.dataclass(frozen=True)
class QuestionAnswering(Classification):
    """The `Objective` of a head `qa_outputs`: the mean cross entropy of an answer's two ends, nats.

    As transformers' ...ForQuestionAnswering has it, over all tokens of a text, its question's too;
    but not over padding, whose logits count there. No answer is one that is the first token, as in
    transformers' examples; a question whose context is not read has no weight.
    """

    def _label_spec(self, rows: int, length: int) -> Any:
        return jax.ShapeDtypeStruct((rows, 2), jnp.int32)

    def _logits(
        self, model: Neo, params: Params, batch: Batch, hidden: Float[Array, "B T D"], key: Any
    ) -> Float[Array, "B T 2"]:
        return head_logits(model, params, hidden)

    def sums(self, logits: Float[Array, "B T 2"], batch: Batch) -> Sums:
        """Returns the sums of a batch of these logits, an answer a unit of weight."""
        is_text = jnp.arange(logits.shape[1])[None] < batch.lengths[:, None]
        logits = jnp.where(is_text[..., None], logits, -jnp.inf).swapaxes(1, 2)  # [B, 2, T]
        losses = jax.nn.logsumexp(logits, axis=-1) - pick(logits, jnp.maximum(batch.labels, 0))
        weights = batch.weights * jnp.all(batch.labels >= 0, axis=1)
        total = jnp.sum(weights * jnp.mean(losses, axis=1))
        return Sums(total, total, jnp.sum(weights))
