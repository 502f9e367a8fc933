"""How the next token is chosen.

The draw of a row depends on its logits, its settings, its text so far and its position alone: not
on what else is in the batch.
"""

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float, Int
from neo_jax.decode.options import Settings
from neo_jax.decode.processors import Context, History, process, truncate
from neo_jax.sharding.rules import pick


def choose(
    logits: Float[Array, "B V"], settings: Settings, history: History, eos: tuple[int, ...]
) -> Int[Array, "B"]:
    """Returns the next token of each row.

    Args:
      logits: of the next token, float32.
      settings: of each row.
      history: the text so far; where the next token will stand decides the draw, with the seed.
      eos: the ids that end a text.
    """

    def draw() -> Array:
        sampled = jax.vmap(_draw)(settings.seed, history.lengths, cut(logits))
        return jnp.where(settings.temperature > 0, sampled, greedy)

    context = Context(settings, history, jnp.arange(logits.shape[1])[None], eos)
    logits = process(logits, context)
    greedy = likeliest(logits)
    draws, cut = truncate(context)
    # Looking for what to keep and drawing noise is not free: greedy batches skip both.
    return jax.lax.cond(draws, draw, lambda: greedy)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Returns the first of the largest logits of each row.

    In two passes that CPUs vectorise, which an argmax they do not.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == largest, ids, logits.shape[-1] - 1).min(axis=-1)


def processed(
    logits: Float[Array, "B V"], settings: Settings, history: History, eos: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Returns logits whose softmax is the distribution that `choose` draws from.

    They are -inf where a token is not kept. Rows of temperature 0, which take the likeliest token,
    are penalized but neither scaled nor truncated.
    """
    context = Context(settings, history, jnp.arange(logits.shape[1])[None], eos)
    logits = process(logits, context)
    draws, cut = truncate(context)
    return jax.lax.cond(draws, cut, lambda logits: logits, logits)


def logprobs_of(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns the log-probability, in nats, that each position's logits give to a token."""
    return pick(jax.nn.log_softmax(logits), tokens)


def _draw(seed: Array, position: Array, logits: Float[Array, "V"]) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)
