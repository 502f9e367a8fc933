"""How the next token is chosen. Every setting is an array over the batch.

So requests with different settings share one compiled step, and the draw of a row depends on its
logits, its settings, its text so far and its position alone: not on what else is in the batch.

Settings act in transformers' order: repetition penalty (Keskar et al., 2019), no repeated n-grams
(Paulus et al., 2018), banned tokens, the least number of new tokens and forced tokens on every row;
then, on rows that draw, temperature, top-k, top-p (Holtzman et al., 2020) and min-p (Nguyen et al.,
2024).
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Bool, Float, Int, UInt
from neo_jax.errors import NeoError, brief, check_numbers, checked
from neo_jax.sharding.rules import pick

_LARGEST = 1e6  # of what divides logits: float32 holds what comes of it


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What a user says about sampling.

    Raises:
      NeoError: a value is out of its range.
    """

    temperature: float = 0.7  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # keep only the k likeliest tokens; 0 is off
    top_p: float = 0.9  # keep the fewest tokens that hold this probability; 1 is off
    min_p: float = 0.0  # drop what is less likely than this part of the likeliest; 0 is off
    repetition_penalty: float = 1.0  # above 1 makes what the text already holds unlikelier
    no_repeat_ngram_size: int = 0  # no n tokens in a row occur twice, prompt included; 0 is off
    min_new_tokens: int = 0  # the end of text cannot come before
    seed: int = 0  # the same prompt, options and seed give the same text
    suppress_tokens: tuple[int, ...] = ()  # ids that are never written
    begin_suppress_tokens: tuple[int, ...] = ()  # ids that are not written first
    # ids of words that are not written; the end of text alone is none
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int = -1  # the id that follows a prompt of one token; -1 is off
    forced_eos_token_id: int = -1  # the id that comes last where max_new_tokens end a text; -1: off

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _ids(name, getattr(self, name)))
        words = _listed("bad_words_ids", self.bad_words_ids)
        object.__setattr__(self, "bad_words_ids", tuple(_ids("bad_words_ids", w) for w in words))
        if () in self.bad_words_ids:
            raise NeoError("bad_words_ids holds a word of no ids; leave it out.")
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            if not -1 <= forced < 2**31:
                raise NeoError(f"{name} must be an id, or -1 for none, not {forced}.")
            if forced in self.suppress_tokens:
                raise NeoError(f"{name} {forced} is one of suppress_tokens; leave out one of them.")
        for name in ("top_k", "no_repeat_ngram_size", "min_new_tokens"):
            if not 0 <= getattr(self, name) < 2**31:
                raise NeoError(
                    f"{name} must be a whole number from 0 (off) to 2**31 - 1, "
                    f"not {getattr(self, name)}."
                )
        if not 0 <= self.temperature <= _LARGEST:
            raise NeoError(
                f"temperature must lie between 0 and {_LARGEST:g}, not be {self.temperature}."
            )
        if not 0 < self.top_p <= 1:
            raise NeoError(f"top_p must lie in (0, 1], not {self.top_p}; 1 is off.")
        if not 0 <= self.min_p <= 1:
            raise NeoError(f"min_p must lie in [0, 1], not {self.min_p}; 0 is off.")
        if not 0 < self.repetition_penalty <= _LARGEST:
            raise NeoError(
                f"repetition_penalty must be above 0 and at most {_LARGEST:g}, not "
                f"{self.repetition_penalty}; 1 is off."
            )
        if not 0 <= self.seed < 2**32:
            raise NeoError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed}.")

    @property
    def bans(self) -> list[tuple[tuple[int, ...], bool]]:
        """Ids that may not follow each other, and whether that is for the first new token alone."""
        first = [((i,), True) for i in self.begin_suppress_tokens]
        return [*first, *(((i,), False) for i in self.suppress_tokens),
                *((word, False) for word in self.bad_words_ids)]  # fmt: skip


class Settings(NamedTuple):
    """`SamplingOptions` of every row."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    no_repeat_ngram_size: Int[Array, "B"]
    min_new_tokens: Int[Array, "B"]
    seed: UInt[Array, "B"]
    forced_bos_token_id: Int[Array, "B"]
    forced_eos_token_id: Int[Array, "B"]
    # Ids of which the last may not follow the others; -1 before them is any token, all of them none
    bans: Int[Array, "B N L"]
    bans_first: Bool[Array, "B N"]  # whether that is for the first new token alone


_COLUMNS = {
    field.name: {int: np.int32, float: np.float32}[type(field.default)]
    for field in dataclasses.fields(SamplingOptions)
    if type(field.default) is not tuple
} | {"seed": np.uint32}


class History(NamedTuple):
    """The texts so far, which penalties look at."""

    tokens: Int[Array, "B S"]  # what follows `lengths` tokens is nothing
    lengths: Int[Array, "B"]  # prompt and new tokens; at least 1
    prompt_lengths: Int[Array, "B"]
    limits: Int[Array, "B"]  # lengths at which to stop


def size_of_bans(options: Iterable[SamplingOptions]) -> tuple[int, int]:
    """Returns how many bans rows have room for, and of how many ids: few sizes, as few programs."""
    bans = [each.bans for each in options]
    most = max((len(each) for each in bans), default=0)
    longest = max((len(ids) for each in bans for ids, _ in each), default=0)
    return max(16, 1 << (most - 1).bit_length()), max(4, 1 << (longest - 1).bit_length())


def stack_settings(
    options: Sequence[SamplingOptions], size: tuple[int, int] | None = None
) -> Settings:
    """Returns a row for each of several options.

    Args:
      options: of the rows.
      size: see `size_of_bans`; where these options join others it is that of all.
    """
    # Filled by numpy: jnp.full would compile a program for each.
    bans = np.full((len(options), *(size or size_of_bans(options))), -1, np.int32)
    first = np.zeros(bans.shape[:2], bool)
    for row, each in enumerate(options):
        for i, (ids, is_first) in enumerate(each.bans):
            bans[row, i, -len(ids) :] = ids
            first[row, i] = is_first
    columns: dict[str, Any] = {
        name: np.array([getattr(each, name) for each in options], dtype)
        for name, dtype in _COLUMNS.items()
    }
    columns |= {"bans": bans, "bans_first": first}
    return Settings(**{name: jnp.asarray(column) for name, column in columns.items()})


def make_settings(options: SamplingOptions, seeds: Sequence[int]) -> Settings:
    """Returns the same options for every row, a row for each seed."""
    return stack_settings([dataclasses.replace(options, seed=int(seed)) for seed in seeds])


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
        kept = _truncated(logits, settings)
        sampled = jax.vmap(_draw)(settings.seed, history.lengths, kept)
        return jnp.where(settings.temperature > 0, sampled, greedy)

    logits = _penalized(logits, settings, history, eos)
    greedy = likeliest(logits)
    # Looking for what to keep and drawing noise is not free: greedy batches skip both.
    return jax.lax.cond(jnp.any(settings.temperature > 0), draw, lambda: greedy)


def likeliest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Returns the first of the largest logits of each row.

    In two passes that CPUs vectorise, which an argmax they do not.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = logits.max(axis=-1, keepdims=True)
    return jnp.where(logits == largest, ids, logits.shape[-1] - 1).min(axis=-1)


def is_end(tokens: Int[Array, "..."], eos: tuple[int, ...]) -> Bool[Array, "..."]:
    """Marks the tokens that end a text."""
    return functools.reduce(operator.or_, [tokens == i for i in eos], jnp.zeros(tokens.shape, bool))


def processed(
    logits: Float[Array, "B V"], settings: Settings, history: History, eos: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Returns logits whose softmax is the distribution that `choose` draws from.

    They are -inf where a token is not kept. Rows of temperature 0, which take the likeliest token,
    are penalized but neither scaled nor truncated.
    """
    logits = _penalized(logits, settings, history, eos)
    return jax.lax.cond(
        jnp.any(settings.temperature > 0), lambda: _truncated(logits, settings), lambda: logits
    )


def logprobs_of(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns the log-probability, in nats, that each position's logits give to a token."""
    return pick(jax.nn.log_softmax(logits), tokens)


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise NeoError(f"{name} must be a list, not {brief(values)}.")
    return tuple(values)


def _ids(name: str, values: Any) -> tuple[int, ...]:
    ids = tuple(checked(f"an id of {name}", value, int) for value in _listed(name, values))
    if not all(0 <= i < 2**31 for i in ids):
        raise NeoError(f"{name} holds {min(ids) if min(ids) < 0 else max(ids)}, which is no id.")
    return ids


def _draw(seed: Array, position: Array, logits: Float[Array, "V"]) -> Array:
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def _penalized(
    logits: Float[Array, "B V"], settings: Settings, history: History, eos: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Applies what depends on the text so far; each part costs only batches that ask for it."""
    lengths, begins = history.lengths, history.prompt_lengths
    ids = jnp.arange(logits.shape[1])[None]

    def penalize(logits: Array) -> Array:
        indices = jnp.arange(history.tokens.shape[1])[None]
        seen = _marks(history.tokens, indices < lengths[:, None], logits.shape[1])
        penalty = settings.repetition_penalty[:, None]
        return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

    def ban_ngrams(logits: Array) -> Array:
        ends = _ends_of_ngrams(history, settings.no_repeat_ngram_size)
        return jnp.where(_marks(history.tokens, ends, logits.shape[1]), -jnp.inf, logits)

    def ban(logits: Array) -> Array:
        completed = _completed(history, settings.bans) & (banned >= 0)
        return jnp.where(_marks(banned, completed, logits.shape[1]), -jnp.inf, logits)

    def ban_end(logits: Array) -> Array:
        return jnp.where(early[:, None] & is_end(ids, eos), -jnp.inf, logits)

    def force(logits: Array) -> Array:
        only = jnp.where(ids == forced[:, None], 0.0, -jnp.inf)
        return jnp.where(forced[:, None] >= 0, only, logits)

    def apply_all(logits: Array) -> Array:
        for asked, apply in rules:
            logits = jax.lax.cond(asked, apply, lambda logits: logits, logits)
        return logits

    # A first token that is forced comes before the first that is free.
    begins = begins + ((begins == 1) & (settings.forced_bos_token_id >= 0))
    banned = jnp.where(
        settings.bans_first & (lengths != begins)[:, None], -1, settings.bans[..., -1]
    )
    early = lengths - history.prompt_lengths < settings.min_new_tokens
    forced = jnp.where(lengths == 1, settings.forced_bos_token_id, -1)
    last = (lengths == history.limits - 1) & (settings.forced_eos_token_id >= 0)
    forced = jnp.where(last, settings.forced_eos_token_id, forced)
    rules = [
        (jnp.any(settings.repetition_penalty != 1), penalize),
        (jnp.any(settings.no_repeat_ngram_size > 0), ban_ngrams),
        (jnp.any(banned >= 0), ban),
        (jnp.any(early), ban_end),
        (jnp.any(forced >= 0), force),
    ]
    # Devices wait for the host at each condition: where nothing is asked for, at one.
    some = functools.reduce(operator.or_, [asked for asked, _ in rules])
    return jax.lax.cond(some, apply_all, lambda logits: logits, logits)


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


def _truncated(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Divides by the temperature and drops what is not kept, in rows whose tokens are drawn."""
    draws = settings.temperature > 0
    temperature = jnp.where(draws, jnp.maximum(settings.temperature, 1e-6), 1)
    scaled = logits / temperature[:, None]
    truncates = (settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)
    return jax.lax.cond(
        jnp.any(draws & truncates),
        lambda: jnp.where(_kept(scaled, settings) | ~draws[:, None], scaled, -jnp.inf),
        lambda: scaled,
    )


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
