"""How the next token is chosen. Every setting is an array over the batch.

So requests with different settings share one compiled step, and the draw of a row depends on its
logits, its settings and its position alone: not on what else is in the batch.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Bool, Float, Int, UInt
from neo_jax.errors import NeoError


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What a user says about sampling.

    Raises:
      NeoError: a value is out of its range.
    """

    temperature: float = 0.7  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # keep only the k likeliest tokens; 0 is off
    top_p: float = 0.9  # keep the fewest tokens that hold this probability; 1 is off
    seed: int = 0  # the same prompt, options and seed give the same text

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise NeoError(f"temperature must be 0 or more, and finite, not {self.temperature}.")
        if self.top_k < 0:
            raise NeoError(f"top_k must be 0 (off) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise NeoError(f"top_p must lie in (0, 1], not {self.top_p}; 1 is off.")
        if not 0 <= self.seed < 2**32:
            raise NeoError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed}.")


class Settings(NamedTuple):
    """`SamplingOptions` of every row."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    seed: UInt[Array, "B"]


def make_settings(options: SamplingOptions, seeds: list[int]) -> Settings:
    """Returns the same options for every row, a row for each seed."""
    rows = (len(seeds),)  # filled by numpy: jnp.full would compile a program for each
    return Settings(
        temperature=jnp.asarray(np.full(rows, options.temperature, np.float32)),
        top_k=jnp.asarray(np.full(rows, options.top_k, np.int32)),
        top_p=jnp.asarray(np.full(rows, options.top_p, np.float32)),
        seed=jnp.asarray(np.asarray(seeds, np.uint32)),
    )


def choose(
    logits: Float[Array, "B V"], settings: Settings, positions: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
      logits: of the next token, float32.
      settings: of each row.
      positions: where each row's next token will stand; decides the random draw with the seed.
    """

    def draw() -> Array:
        scaled = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
        truncates = jnp.any((settings.top_k > 0) | (settings.top_p < 1))
        kept = jax.lax.cond(
            truncates, lambda: _kept(scaled, settings), lambda: jnp.ones(scaled.shape, bool)
        )
        sampled = jax.vmap(_draw)(settings.seed, positions, jnp.where(kept, scaled, -jnp.inf))
        return jnp.where(settings.temperature > 0, sampled, greedy)

    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Sorting a vocabulary and drawing noise for it is not free: greedy batches skip both.
    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)


def logprobs_of(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns the log-probability, in nats, that each position's logits give to a token."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)[..., 0]


def _draw(seed: Array, position: Array, logits: Float[Array, "V"]) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _kept(logits: Float[Array, "B V"], settings: Settings) -> Bool[Array, "B V"]:
    """Marks the tokens that top-k and then top-p (Holtzman et al., 2020) keep."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    vocab = logits.shape[-1]
    last = jnp.where(settings.top_k > 0, jnp.minimum(settings.top_k, vocab), vocab) - 1
    least_by_k = jnp.take_along_axis(ordered, last[:, None], axis=-1)
    probabilities = jax.nn.softmax(jnp.where(ordered >= least_by_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Rounded sums reach 1 before the last token does, and a top_p of 1 keeps that one too.
    top_p = jnp.where(settings.top_p < 1, settings.top_p, jnp.inf)
    least_by_p = jnp.min(
        jnp.where(before < top_p[:, None], ordered, jnp.inf), axis=-1, keepdims=True
    )
    return logits >= jnp.maximum(least_by_k, least_by_p)
