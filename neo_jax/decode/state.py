"""Sequences that are being generated, as arrays of which every leaf leads with batch.

Rows enter a state, leave it and change places with one operation on every leaf. A state has one
capacity for all rows, which can be changed.
"""

import functools
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from neo_jax.axes import BATCH, Array, Bool, Float, Int
from neo_jax.decode.capacity import LENGTH_UNIT
from neo_jax.decode.options import Room, SamplingOptions, Settings, stack_settings
from neo_jax.decode.processors import History
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import Sharding, constrain

T = TypeVar("T")

CHECKED_STEPS = 8
"""New tokens of a row whose alternatives are kept: whoever wants them looks as often."""


class Alternatives(NamedTuple):
    """The likeliest tokens in the place of each of a row's newest, by the place modulo R."""

    ids: Int[Array, "B R K"]
    logprobs: Float[Array, "B R K"]


class DecodeState(NamedTuple):
    """A batch of sequences that are being generated; every leaf leads with batch."""

    tokens: Int[Array, "B S"]  # the prompt, then what was generated, then zeros
    logprobs: Float[Array, "B S"]  # the model's log p of each generated token, without truncation
    lengths: Int[Array, "B"]  # tokens so far
    prompt_lengths: Int[Array, "B"]
    limits: Int[Array, "B"]  # lengths at which to stop
    done: Bool[Array, "B"]
    settings: Settings
    alternatives: Alternatives
    cache: Cache  # holds every token but the newest

    @property
    def history(self) -> History:
        """The texts, as sampling looks at them."""
        return History(self.tokens, self.lengths, self.prompt_lengths, self.limits)


class Entering(NamedTuple):
    """Texts that enter a batch of B rows: the first `num_texts`; what follows is padding."""

    sources: Int[Array, "B"]  # the row of each text's prompt where that was read; may stand twice
    rows: Int[Array, "B"]  # the row of the batch that the text takes
    num_texts: Int[Array, ""]
    limits: Int[Array, "B"]  # lengths at which to stop
    settings: Settings


def begin_rows(
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    settings: Settings,
    cache: Cache,
    slots: int,
) -> DecodeState:
    """Returns the state of prompts [B, T] whose tokens but the newest are in a cache."""
    rows = tokens.shape[0]
    kept = (rows, CHECKED_STEPS, settings.alternatives.shape[1])
    return DecodeState(
        tokens=jnp.pad(tokens[:, :slots], ((0, 0), (0, max(slots - tokens.shape[1], 0)))),
        logprobs=jnp.zeros((rows, slots), jnp.float32),
        lengths=lengths,
        prompt_lengths=lengths,
        limits=limits,
        done=lengths >= limits,
        settings=settings,
        alternatives=Alternatives(jnp.zeros(kept, jnp.int32), jnp.zeros(kept, jnp.float32)),
        cache=cache,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(model: Neo, rows: int, slots: int, room: Room) -> DecodeState:
    """Returns a state of rows that are all done, with a capacity of `slots`."""
    neutral = [SamplingOptions(temperature=0.0)] * rows  # what no request wants costs nothing
    ones, settings = jnp.ones(rows, jnp.int32), stack_settings(neutral, room)
    tokens = jnp.zeros((rows, min(LENGTH_UNIT, slots)), jnp.int32)
    cache = caching.empty(model.config, rows, slots, model.cache_dtype or model.dtype)
    return place(model.sharding, begin_rows(tokens, ones, ones, settings, cache, slots))


@functools.partial(jax.jit, static_argnums=(0, 1))
def resize(model: Neo, slots: int, state: DecodeState) -> DecodeState:
    """Makes a state one for texts of up to `slots` tokens; those that are not done must fit."""

    def fit(leaf: Array) -> Array:
        return jnp.pad(leaf[:, :slots], ((0, 0), (0, max(slots - leaf.shape[1], 0))))

    cache = caching.resize(model.config, state.cache, slots)
    tokens, logprobs = fit(state.tokens), fit(state.logprobs)
    state = state._replace(tokens=tokens, logprobs=logprobs, cache=cache)
    return place(model.sharding, state)


@functools.partial(jax.jit, static_argnums=0)
def take_rows(
    model: Neo, state: DecodeState, sources: Int[Array, "R"], count: Int[Array, ""]
) -> DecodeState:
    """Returns a state of these rows of another; those after the first `count` are done."""
    state = jax.tree.map(lambda leaf: jnp.take(leaf, sources, axis=0, mode="clip"), state)
    done = state.done | (jnp.arange(sources.shape[0]) >= count)
    return place(model.sharding, state._replace(done=done))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(model: Neo, state: DecodeState, read: DecodeState, entering: Entering) -> DecodeState:
    """Puts texts whose prompts another state has into rows of a state; consumes `state`.

    Args:
      model: the model.
      state: what takes them; its capacity is no smaller than that of `read`.
      read: their prompts, with limits of its own, which are kept.
      entering: which of these, and where to.
    """

    def put_one(i: Array, state: DecodeState) -> DecodeState:
        piece = _row(read, entering.sources[i])._replace(settings=_row(entering.settings, i))
        return _put(state, piece, entering.rows[i])

    return place(model.sharding, jax.lax.fori_loop(0, entering.num_texts, put_one, state))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert_read(
    model: Neo,
    state: DecodeState,
    tokens: Int[Array, "R T"],
    lengths: Int[Array, "R"],
    cache: Cache,
    entering: Entering,
) -> DecodeState:
    """Puts texts whose prompts were read by chunks into rows of a state; consumes `state`.

    Args:
      model: the model.
      state: what takes them; its capacity holds every text.
      tokens: of the prompts.
      lengths: of the prompts.
      cache: of the prompts, that of a `prefill.Reading`.
      entering: which of the prompts, and where to.
    """
    slots = state.tokens.shape[1]

    def put_one(i: Array, state: DecodeState) -> DecodeState:
        ids, length, read = _row((tokens, lengths, cache), entering.sources[i])
        limit, settings = _row((entering.limits, entering.settings), i)
        kept = caching.from_sequence(model.config, read, length - 1, slots, model.cache_dtype)
        piece = begin_rows(ids, length, limit, settings, kept, slots)
        return _put(state, piece, entering.rows[i])

    return place(model.sharding, jax.lax.fori_loop(0, entering.num_texts, put_one, state))


def _row(tree: T, row: Array) -> T:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), tree)


def _put(state: DecodeState, piece: DecodeState, row: Array) -> DecodeState:
    """Writes a state of one row, of no larger capacity, over a row."""
    state = state._replace(cache=caching.clear_rows(state.cache, row))
    return jax.tree.map(
        lambda old, piece: jax.lax.dynamic_update_slice_in_dim(old, piece, row, 0), state, piece
    )


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def stop_rows(model: Neo, state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Makes rows done; consumes `state`."""
    return place(model.sharding, state._replace(done=state.done | rows))


def place(sharding: Sharding | None, state: DecodeState) -> DecodeState:
    """Tells the compiler how a state is sharded."""

    def rows(x: Array) -> Array:
        return constrain(sharding, x, (BATCH, *[None] * (x.ndim - 1)), "the decoding state")

    placed = jax.tree.map(rows, state._replace(cache=()))
    return placed._replace(cache=tuple(caching.place(sharding, layer) for layer in state.cache))
