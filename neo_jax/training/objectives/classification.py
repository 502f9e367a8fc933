"""Classification of texts: the head `score` on the last token of each; what other heads share."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.labels import HeadConfig
from neo_jax.model import scan
from neo_jax.model.heads import head_logits, init_head
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import pick
from neo_jax.training.objectives import Sums


class Batch(NamedTuple):
    """Texts, padded on the right, and their labels, which are as `neo_jax.data.labelled` says."""

    tokens: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    labels: Array
    weights: Float[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Classification:
    """The `Objective` of classifiers, as transformers has it for each problem type.

    Of one label the cross entropy in nats; of several the mean binary cross entropy of the labels;
    of a regression the squared error.
    """

    head: HeadConfig

    def init(self, model: Neo, key: Array) -> Params:
        """Draws the head."""
        return init_head(model, key)

    def batch_spec(self, rows: int, length: int, has_segment_starts: bool) -> Batch:
        """Returns the shapes of the longest batch; of `length` any smaller one may be."""
        shape: Any = jax.ShapeDtypeStruct
        return Batch(
            shape((rows, length), jnp.int32),
            shape((rows,), jnp.int32),
            self._label_spec(rows, length),
            shape((rows,), jnp.float32),
        )

    def _label_spec(self, rows: int, length: int) -> Any:
        problem = self.head.problem_type
        kind = jnp.int32 if problem == "single_label_classification" else jnp.float32
        several = (len(self.head.labels),) if problem == "multi_label_classification" else ()
        return jax.ShapeDtypeStruct((rows, *several), kind)

    def embed(
        self, model: Neo, params: Params, batch: Batch, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the first block reads of a batch."""
        return scan.embed(model, params, batch.tokens, None, key)

    def logits(
        self,
        model: Neo,
        params: Params,
        batch: Batch,
        *,
        embedded: Float[Array, "B T D"] | None = None,
        key: Array | None = None,
        **options: Any,
    ) -> Array:
        """Returns the logits of the texts, of stacked parameters; the options are `loss`'s."""
        if embedded is None:
            embedded = self.embed(model, params, batch, key)
        hidden = scan.hidden(model, params, embedded, None, key=key, **options)
        return self._logits(model, params, batch, hidden, key)

    def _logits(
        self, model: Neo, params: Params, batch: Batch, hidden: Float[Array, "B T D"], key: Any
    ) -> Array:
        # A sum of which all terms but one are zero: a gather may be of rows on other devices.
        here = jnp.arange(hidden.shape[1])[None] == batch.lengths[:, None] - 1
        last = jnp.sum(jnp.where(here[..., None], hidden, 0), axis=1, keepdims=True)
        return head_logits(model, params, last)[:, 0]

    def loss(self, model: Neo, params: Params, batch: Batch, **options: Any) -> Sums:
        """Returns the sums of a batch, a text a unit of weight."""
        return self.sums(self.logits(model, params, batch, **options), batch)

    def evaluate(self, model: Neo, params: Params, batch: Batch) -> Sums:
        """Returns the sums of a batch."""
        return self.loss(model, params, batch)

    def sums(self, logits: Array, batch: Batch) -> Sums:
        """Returns the sums of a batch of these logits."""
        total = jnp.sum(batch.weights * self._losses(logits, batch.labels))
        return Sums(total, total, jnp.sum(batch.weights))

    def _losses(self, logits: Float[Array, "B C"], labels: Array) -> Float[Array, "B"]:
        if self.head.problem_type == "regression":
            return jnp.square(logits[:, 0] - labels)
        if self.head.problem_type == "multi_label_classification":
            # -log sigmoid of the logit where the label holds, of its opposite where not.
            return jnp.mean(jax.nn.softplus(logits) - labels * logits, axis=1)
        return jax.nn.logsumexp(logits, axis=1) - pick(logits, labels)
