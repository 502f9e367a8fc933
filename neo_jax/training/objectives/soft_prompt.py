"""Language modelling behind virtual tokens: a soft prompt, or what features are mapped to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from neo_jax.axes import Array, Float, Params
from neo_jax.model import scan
from neo_jax.model.prefix_mapper import MAPPER, init_mapper, map_features
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.transformer import Neo
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.next_token import Batch, NextToken
from neo_jax.transforms.soft_prompt import SoftPromptConfig


@dataclasses.dataclass(frozen=True)
class SoftPrompt(NextToken):
    """The `Objective` of a soft prompt: `NextToken`, of sequences whose texts begin with it.

    The feed has put its ids there; see `neo_jax.data.packing`. What `init` draws is trained, and
    the model not.
    """

    def init(self, model: Neo, key: Array) -> Params:
        """Draws the table of the model's virtual tokens."""
        shape = model.virtual_tokens, model.config.embed_dim
        return {PROMPT: normal(0.02)(key, shape)}

    def loss(self, model: Neo, params: Params, batch: Batch, **options: Any) -> Sums:
        """Returns the sums of a batch."""
        embedded = options.pop("embedded", None)
        if embedded is None:
            embedded = self.embed(model, params, batch, options.get("key"))
        # Of a virtual token, which no weight counts, there is no logit.
        tokens = jnp.minimum(batch.tokens, model.config.vocab_size - 1)
        known = batch._replace(tokens=tokens)
        return super().loss(model, params, known, embedded=embedded, **options)


@dataclasses.dataclass(frozen=True)
class MappedPrefix(SoftPrompt):
    """The `Objective` of a mapper: a soft prompt that it makes of the features of each pair.

    The feed has left places for it.
    """

    num_features: int = 0
    config: SoftPromptConfig = dataclasses.field(default_factory=SoftPromptConfig)

    def init(self, model: Neo, key: Array) -> Params:
        """Draws the mapper."""
        tokens, width = self.config.tokens, model.config.embed_dim
        return {MAPPER: init_mapper(key, self.num_features, tokens, width, self.config.hidden)}

    def batch_spec(self, rows: int, length: int, has_segment_starts: bool) -> Batch:
        """Returns the shapes of a batch."""
        spec = super().batch_spec(rows, length, has_segment_starts)
        shape: Any = jax.ShapeDtypeStruct((rows, self.num_features), jnp.float32)
        return spec._replace(features=shape)

    def embed(
        self, model: Neo, params: Params, batch: Batch, key: Array | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the first block reads of a batch."""
        assert batch.features is not None
        prefix = map_features(params[MAPPER], batch.features)
        tokens, starts = batch.tokens[:, :-1], batch.segment_starts
        return scan.embed(model, params, tokens, starts, key, prefix)
