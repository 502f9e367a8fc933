"""Logits processors: pure functions over a batch that change what may come next.

A processor looks at a `Context`. It returns whether any row wants a change, and the function that
makes it: where no row does, a step skips it. Which processors there are is fixed for a program; the
settings are arrays, so that a request with others compiles nothing.

They act in transformers' order, around which OpenAI's stand as vLLM has them: biases, repetition
penalty (Keskar et al., 2019), presence and frequency, no repeated n-grams (Paulus et al., 2018),
banned tokens, the least number of new tokens and forced tokens on every row; then, on rows that
draw, temperature, top-k, top-p (Holtzman et al., 2020) and min-p (Nguyen et al., 2024).
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Bool, Float, Int
from neo_jax.decode.options import Settings


class History(NamedTuple):
    """The texts so far, which processors look at."""

    tokens: Int[Array, "B S"]  # what follows `lengths` tokens is nothing
    lengths: Int[Array, "B"]  # prompt and new tokens; at least 1
    prompt_lengths: Int[Array, "B"]
    limits: Int[Array, "B"]  # lengths at which to stop


class Context(NamedTuple):
    """What processors look at."""

    settings: Settings
    history: History
    ids: Int[Array, "1 V"]  # of all tokens
    eos: tuple[int, ...]  # the ids that end a text


Change = tuple[Bool[Array, ""], Callable[[Float[Array, "B V"]], Float[Array, "B V"]]]
"""Whether any row wants a change of its logits, and the change."""

Processor = Callable[[Context], Change]


def penalize_repetition(context: Context) -> Change:
    """Divides logits above 0 of tokens that the text holds, and multiplies those below."""
    settings, history = context.settings, context.history

    def change(logits: Array) -> Array:
        indices = jnp.arange(history.tokens.shape[1])[None]
        seen = _marks(history.tokens, indices < history.lengths[:, None], logits.shape[1])
        penalty = settings.repetition_penalty[:, None]
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    return jnp.any(settings.repetition_penalty != 1), change


def penalize_new(context: Context) -> Change:
    """Subtracts from logits of tokens that the new text holds: once, and for each time."""
    settings, history = context.settings, context.history
    presence, frequency = settings.presence_penalty, settings.frequency_penalty

    def change(logits: Array) -> Array:
        indices = jnp.arange(history.tokens.shape[1])[None]
        is_new = (indices >= history.prompt_lengths[:, None]) & (indices < history.lengths[:, None])
        rows = jnp.arange(logits.shape[0])[:, None]
        ids = jnp.where(is_new, history.tokens, logits.shape[1])
        counts = jnp.zeros_like(logits).at[rows, ids].add(1, mode="drop")
        return logits - presence[:, None] * (counts > 0) - frequency[:, None] * counts

    return jnp.any((presence != 0) | (frequency != 0)), change


def add_biases(context: Context) -> Change:
    """Adds to the logits of tokens what the settings say."""
    ids, biases = context.settings.bias_ids, context.settings.biases

    def change(logits: Array) -> Array:
        rows = jnp.arange(logits.shape[0])[:, None]
        return logits.at[rows, jnp.where(ids < 0, logits.shape[1], ids)].add(biases, mode="drop")

    return jnp.any(ids >= 0), change


def ban_ngrams(context: Context) -> Change:
    """Bans the tokens that would complete n tokens that the text holds."""
    settings, history = context.settings, context.history

    def change(logits: Array) -> Array:
        ends = _ends_of_ngrams(history, settings.no_repeat_ngram_size)
        return jnp.where(_marks(history.tokens, ends, logits.shape[1]), -jnp.inf, logits)

    return jnp.any(settings.no_repeat_ngram_size > 0), change


def ban_words(context: Context) -> Change:
    """Bans tokens, and those that would complete words."""
    settings, history = context.settings, context.history
    begins = history.prompt_lengths
    # A first token that is forced comes before the first that is free.
    begins = begins + ((begins == 1) & (settings.forced_bos_token_id >= 0))
    skipped = settings.bans_first & (history.lengths != begins)[:, None]
    banned = jnp.where(skipped, -1, settings.bans[..., -1])

    def change(logits: Array) -> Array:
        completed = _completed(history, settings.bans) & (banned >= 0)
        return jnp.where(_marks(banned, completed, logits.shape[1]), -jnp.inf, logits)

    return jnp.any(banned >= 0), change


def delay_end(context: Context) -> Change:
    """Bans the end of text until there are enough new tokens."""
    history = context.history
    early = history.lengths - history.prompt_lengths < context.settings.min_new_tokens

    def change(logits: Array) -> Array:
        return jnp.where(early[:, None] & is_end(context.ids, context.eos), -jnp.inf, logits)

    return jnp.any(early), change


def force_tokens(context: Context) -> Change:
    """Leaves one token alone as the first after a prompt of one, or as the last."""
    settings, history = context.settings, context.history
    forced = jnp.where(history.lengths == 1, settings.forced_bos_token_id, -1)
    last = (history.lengths == history.limits - 1) & (settings.forced_eos_token_id >= 0)
    forced = jnp.where(last, settings.forced_eos_token_id, forced)

    def change(logits: Array) -> Array:
        only = jnp.where(context.ids == forced[:, None], 0.0, -jnp.inf)
        return jnp.where(forced[:, None] >= 0, only, logits)

    return jnp.any(forced >= 0), change


def truncate(context: Context) -> Change:
    """Divides by the temperature and drops what is not kept, in rows whose tokens are drawn."""
    settings = context.settings

    def change(logits: Array) -> Array:
        draws = settings.temperature > 0
        temperature = jnp.where(draws, jnp.maximum(settings.temperature, 1e-6), 1)
        scaled = logits / temperature[:, None]
        truncates = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
        return jax.lax.cond(
            jnp.any(draws & truncates),
            lambda: jnp.where(_kept(scaled, settings) | ~draws[:, None], scaled, -jnp.inf),
            lambda: scaled,
        )

    return jnp.any(settings.temperature > 0), change


PROCESSORS: tuple[Processor, ...] = (
    add_biases,
    penalize_repetition,
    penalize_new,
    ban_ngrams,
    ban_words,
    delay_end,
    force_tokens,
)
"""What acts on every row, in this order; `truncate` follows on rows that draw."""


def process(logits: Float[Array, "B V"], context: Context) -> Float[Array, "B V"]:
    """Returns logits after all of `PROCESSORS`."""
    changes = [processor(context) for processor in PROCESSORS]

    def change_all(logits: Array) -> Array:
        for wanted, change in changes:
            logits = jax.lax.cond(wanted, change, lambda logits: logits, logits)
        return logits

    # Devices wait for the host at each condition: where nothing is wanted, at one.
    any_wanted = functools.reduce(operator.or_, [wanted for wanted, _ in changes])
    return jax.lax.cond(any_wanted, change_all, lambda logits: logits, logits)


def is_end(tokens: Int[Array, "..."], eos: tuple[int, ...]) -> Bool[Array, "..."]:
    """Marks the tokens that end a text."""
    return functools.reduce(operator.or_, [tokens == i for i in eos], jnp.zeros(tokens.shape, bool))


def _completed(history: History, bans: Int[Array, "B N L"]) -> Bool[Array, "B N"]:
    """Marks bans whose ids but for the last are the end of the text."""
    places = history.lengths[:, None] - jnp.arange(bans.shape[2] - 1, 0, -1)[None]
    newest = jnp.take_along_axis(history.tokens, jnp.clip(places, 0), axis=1)
    newest = jnp.where(places >= 0, newest, -2)[:, None]
    before = bans[..., :-1]
    return jnp.all((before == -1) | (before == newest), axis=-1)


def _marks(tokens: Int[Array, "B S"], which: Bool[Array, "B S"], vocab: int) -> Bool[Array, "B V"]:
    """Marks the ids of some tokens of each row."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    ids = jnp.where(which, tokens, vocab)
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, ids].set(True, mode="drop")


def _ends_of_ngrams(history: History, sizes: Int[Array, "B"]) -> Bool[Array, "B S"]:
    """Marks tokens before which the text reads as it does at its end, over size - 1 tokens."""
    tokens, lengths = history.tokens, history.lengths[:, None]
    indices, sizes = jnp.arange(tokens.shape[1])[None], sizes[:, None]

    def compare(back: Array, same: Array) -> Array:
        last = jnp.take_along_axis(tokens, jnp.clip(lengths - back, 0), axis=1)
        return same & ((jnp.roll(tokens, back, axis=1) == last) | (back >= sizes))

    whole = (sizes > 0) & (indices >= sizes - 1) & (indices < lengths)
    return jax.lax.fori_loop(1, jnp.max(sizes), compare, whole)


def _kept(logits: Float[Array, "B V"], settings: Settings) -> Bool[Array, "B V"]:
    """Marks the tokens that top-k, then top-p, then min-p keep."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    ones = jnp.ones_like(logits)
    least = _least(logits, ones, jnp.where(settings.top_k > 0, settings.top_k, jnp.inf))
    masses = jnp.where(logits >= least[:, None], jnp.exp(logits - largest), 0)
    # Rounded sums reach 1 before the last token does, and a top_p of 1 keeps that one too.
    top_p = jnp.where(settings.top_p < 1, settings.top_p, jnp.inf)
    least = jnp.maximum(least, _least(logits, masses, top_p * jnp.sum(masses, axis=-1)))
    least = jnp.maximum(least, largest[:, 0] + jnp.log(settings.min_p))
    return logits >= least[:, None]


def _least(
    logits: Float[Array, "B V"], weights: Float[Array, "B V"], limits: Float[Array, "B"]
) -> Float[Array, "B"]:
    """Returns the least logit above which the others weigh less than a limit.

    Found by halving the range of all float32 numbers, exactly and in 32 sums: a vocabulary takes
    XLA fifteen times as long to sort on a CPU.
    """

    # As integers, with the negative ones turned around, floats are in the same order.
    def order(x: Array) -> Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        return jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))

    def number(bits: Array) -> Array:
        bits = jnp.where(bits >= 0, bits, bits ^ jnp.int32(0x7FFFFFFF))
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, which cannot overflow
        above = jnp.sum(jnp.where(logits > number(middle)[:, None], weights, 0), axis=-1)
        return jnp.where(above < limits, low, middle + 1), jnp.where(above < limits, middle, high)

    high = order(jnp.max(logits, axis=-1))
    low = jnp.full_like(high, order(jnp.float32(-jnp.inf)))
    return number(jax.lax.fori_loop(0, 32, halve, (low, high))[1])
