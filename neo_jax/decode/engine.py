"""The engine: prompts of ids in, ids out, by one compiled prefill and one compiled loop.

A `DecodeState` holds a batch of sequences that are being generated. `start` fills its cache with
the prompts; `run` appends up to a number of tokens to every row, in one `while_loop` on the device
that stops as soon as every row is done. A stream is `run` with one token at a time: the same
program. Lengths are rounded up, see `capacity`, so that another prompt rarely compiles again.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import BATCH, Array, Bool, Float, Int, Params
from neo_jax.decode.capacity import capacity, padded_length
from neo_jax.decode.options import SamplingOptions, Settings, stack_settings
from neo_jax.decode.prefill import read
from neo_jax.decode.processors import History, is_end
from neo_jax.decode.sampling import choose, logprobs_of
from neo_jax.devices.memory import check_batch
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import Loop
from neo_jax.sharding.rules import Sharding, constrain, padded_rows

T = TypeVar("T")


class DecodeState(NamedTuple):
    """A batch of sequences that are being generated; every leaf leads with batch."""

    tokens: Int[Array, "B S"]  # the prompt, then what was generated, then zeros
    logprobs: Float[Array, "B S"]  # the model's log p of each generated token, without truncation
    lengths: Int[Array, "B"]  # tokens so far
    prompt_lengths: Int[Array, "B"]
    limits: Int[Array, "B"]  # lengths at which to stop
    done: Bool[Array, "B"]
    settings: Settings
    cache: Cache  # holds every token but the newest

    @property
    def history(self) -> History:
        """The texts, as sampling looks at them."""
        return History(self.tokens, self.lengths, self.prompt_lengths, self.limits)


def check_tokens(model: Neo, tokens: Sequence[int]) -> None:
    """Checks what the device would silently get wrong.

    Raises:
      NeoError: no tokens, an id outside the vocabulary, or more tokens than the context.
    """
    vocab, context = model.config.vocab_size, model.config.max_length
    if not len(tokens):
        raise NeoError("the prompt is empty; give at least one token.")
    for token in tokens:
        if not 0 <= token < vocab:
            raise NeoError(f"token id {token} is not in the vocabulary, 0 to {vocab - 1}.")
    if len(tokens) > context:
        raise NeoError(f"{len(tokens)} tokens exceed the context of {context}; shorten the text.")


def check_prompts(model: Neo, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Checks prompts as `check_tokens` does, and that the context has room for the new tokens."""
    if max_new_tokens < 1:
        raise NeoError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    context = model.config.max_length
    for prompt in prompts:
        check_tokens(model, prompt)
        if len(prompt) + max_new_tokens > context:
            raise NeoError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"context of {context}; shorten the prompt or ask for at most "
                f"{context - len(prompt)} new tokens."
            )


def check_rows(model: Neo, rows: int, length: int) -> None:
    """Checks that a batch of texts of up to `length` tokens can be, by its caches and logits.

    Raises:
      NeoError: see `check_batch`.
    """
    config, dtype = model.config, model.cache_dtype or model.dtype
    slots = capacity(length, config.max_length)
    row_bytes = caching.sequence_bytes(config, slots, dtype).per_sequence + 4 * config.vocab_size
    check_batch(rows, slots, row_bytes, model.sharding.mesh.size if model.sharding else 1)


def start(
    model: Neo,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
) -> DecodeState:
    """Reads the prompts into a fresh state.

    Raises:
      NeoError: see `check_prompts`.
    """
    check_prompts(model, prompts, max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    slots = capacity(longest + max_new_tokens, model.config.max_length)
    # A mesh may want more rows than there are prompts: the others are done before they begin.
    rows = padded_rows(model.sharding, len(prompts))
    length = padded_length(longest, slots)
    batch = batched([(prompt, max_new_tokens) for prompt in prompts], rows, length)
    if rows > len(prompts):
        last = np.minimum(np.arange(rows), len(prompts) - 1)
        settings = jax.tree.map(lambda x: np.asarray(x)[last], settings)
    return prefill(model, slots, params, *batch, settings)


def batched(
    prompts: Sequence[tuple[Sequence[int], int]], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens [B, T], lengths [B] and limits [B] of prompts and their new tokens.

    Rows that are left over are done before they begin.
    """
    tokens = np.zeros((rows, length), np.int32)
    lengths, limits = np.ones((2, rows), np.int32)
    for row, (prompt, max_new_tokens) in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        lengths[row], limits[row] = len(prompt), len(prompt) + max_new_tokens
    return tokens, lengths, limits


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(
    model: Neo,
    slots: int,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    limits: Int[Array, "B"],
    settings: Settings,
) -> DecodeState:
    """Returns the state after prompts [B, T] of these lengths, with a capacity of `slots`."""
    state = DecodeState(
        tokens=jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1]))),
        logprobs=jnp.zeros((tokens.shape[0], slots), jnp.float32),
        lengths=lengths,
        prompt_lengths=lengths,
        limits=limits,
        done=lengths >= limits,
        settings=settings,
        # The newest token is left to the first step, which so is a step like all others.
        cache=read(model, params, tokens, lengths - 1, slots),
    )
    return _place(model.sharding, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_state(model: Neo, rows: int, like: DecodeState) -> DecodeState:
    """Returns a state of rows that are all done, with the capacity of another state."""
    state = jax.tree.map(lambda leaf: jnp.zeros((rows, *leaf.shape[1:]), leaf.dtype), like)
    neutral = [SamplingOptions(temperature=0.0)] * rows  # what no request wants costs nothing
    _, *bans = like.settings.bans.shape
    state = state._replace(
        lengths=jnp.ones(rows, jnp.int32),
        limits=jnp.ones(rows, jnp.int32),
        done=jnp.ones(rows, bool),
        settings=stack_settings(neutral, (bans[0], bans[1])),
        cache=caching.clear_rows(state.cache, jnp.arange(rows)),
    )
    return _place(model.sharding, state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def resize(model: Neo, slots: int, state: DecodeState) -> DecodeState:
    """Makes a state one for texts of up to `slots` tokens; those that are not done must fit."""

    def fit(leaf: Array) -> Array:
        return jnp.pad(leaf[:, :slots], ((0, 0), (0, max(slots - leaf.shape[1], 0))))

    cache = caching.resize(model.config, state.cache, slots)
    tokens, logprobs = fit(state.tokens), fit(state.logprobs)
    state = state._replace(tokens=tokens, logprobs=logprobs, cache=cache)
    return _place(model.sharding, state)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def insert(
    model: Neo,
    state: DecodeState,
    new: DecodeState,
    sources: Int[Array, "B"],
    rows: Int[Array, "B"],
    count: Int[Array, ""],
    settings: Settings,
) -> DecodeState:
    """Puts rows of another state in the place of rows of this one; consumes `state`.

    Args:
      model: the model.
      state: what takes them.
      new: where they are; its capacity is no larger.
      sources: rows of `new`; one may stand several times.
      rows: the row of `state` for each of them.
      count: how many of these are inserted.
      settings: of each.
    """

    def take(tree: T, row: Array) -> T:
        return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), tree)

    def put_one(i: Array, state: DecodeState) -> DecodeState:
        row = rows[i]
        piece = take(new, sources[i])._replace(settings=take(settings, i))
        state = state._replace(cache=caching.clear_rows(state.cache, row))
        return jax.tree.map(
            lambda old, piece: jax.lax.dynamic_update_slice_in_dim(old, piece, row, 0), state, piece
        )

    return _place(model.sharding, jax.lax.fori_loop(0, count, put_one, state))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def stop_rows(model: Neo, state: DecodeState, rows: Bool[Array, "B"]) -> DecodeState:
    """Makes rows done; consumes `state`."""
    return _place(model.sharding, state._replace(done=state.done | rows))


def _place(sharding: Sharding | None, state: DecodeState) -> DecodeState:
    """Tells the compiler how a state is sharded."""

    def rows(x: Array) -> Array:
        return constrain(sharding, x, (BATCH, *[None] * (x.ndim - 1)), "the decoding state")

    placed = jax.tree.map(rows, state._replace(cache=()))
    return placed._replace(cache=tuple(caching.place(sharding, layer) for layer in state.cache))


@functools.partial(Loop, static_argnums=0, donate_argnums=2)
def run(
    model: Neo,
    params: Params,
    state: DecodeState,
    steps: Int[Array, ""],
    enough: Int[Array, ""] | None = None,
) -> DecodeState:
    """Appends a token to every row that is not done, up to `steps` times; consumes `state`.

    Stops earlier as soon as `enough` rows are done; None is all of them.
    """
    # A loop that carries a cache with a batch axis of 1 copies it at every step on CPUs: XLA moves
    # the axis about, and then keeps both forms. Without the axis it writes in place.
    single = state.tokens.shape[0] == 1

    def carried(cache: Cache) -> Cache:
        return jax.tree.map(lambda x: x[0], cache) if single else cache

    def restored(cache: Cache) -> Cache:
        return jax.tree.map(lambda x: x[None], cache) if single else cache

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        step, state = carry
        done = jnp.sum(state.done, dtype=jnp.int32)
        return (step < steps) & (done < (state.done.shape[0] if enough is None else enough))

    def advance(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        step, state = carry
        state = _step(model, params, state._replace(cache=restored(state.cache)))
        return step + 1, state._replace(cache=carried(state.cache))

    start = (jnp.int32(0), state._replace(cache=carried(state.cache)))
    _, state = jax.lax.while_loop(unfinished, advance, start)
    return _place(model.sharding, state._replace(cache=restored(state.cache)))


def next_logits(
    model: Neo, params: Params, state: DecodeState
) -> tuple[Float[Array, "B 1 V"], Cache]:
    """Reads each row's newest token; returns the logits of the next, and the cache with it."""
    rows, newest = jnp.arange(state.tokens.shape[0]), state.lengths - 1
    tokens = state.tokens[rows, newest][:, None]
    return apply(model, params, tokens, newest[:, None], state.cache)


def apply(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Appends tokens at these positions; returns the logits of what follows each, and the cache."""
    variables = {"params": params}
    hidden, cache = model.apply(variables, tokens, positions, cache, method=Neo.hidden)
    return model.apply(variables, hidden, method=Neo.unembed), cache


def _step(model: Neo, params: Params, state: DecodeState) -> DecodeState:
    """Reads each row's newest token and appends the next."""
    rows = jnp.arange(state.tokens.shape[0])
    logits, cache = next_logits(model, params, state)
    eos = model.config.eos_ids
    token = choose(logits[:, 0], state.settings, state.history, eos)
    logprob = logprobs_of(logits, token[:, None])[:, 0]
    where = jnp.where(state.done, state.tokens.shape[1], state.lengths)  # done rows write nowhere
    lengths = jnp.where(state.done, state.lengths, state.lengths + 1)
    ended = is_end(token, eos) | (lengths >= state.limits)
    return state._replace(
        tokens=state.tokens.at[rows, where].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, where].set(logprob, mode="drop"),
        lengths=lengths,
        done=state.done | ended,
        cache=cache,
    )


class Completion(NamedTuple):
    """What was generated for one prompt."""

    ids: list[int]  # new tokens, the end of text left out
    logprobs: list[float]  # the model's log p of each, in nats, before temperature and truncation
    finish_reason: str  # "eos", "stop", or "length" where max_new_tokens were reached


def generate(
    model: Neo,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
) -> list[Completion]:
    """Completes prompts of any lengths, in one batch.

    Raises:
      NeoError: see `check_prompts`.
    """
    if not prompts:
        return []
    state = start(model, params, prompts, max_new_tokens, settings)
    state = run(model, params, state, max_new_tokens)
    return completions(model, state)[: len(prompts)]


def completions(model: Neo, state: DecodeState) -> list[Completion]:
    """Returns what was generated in each row so far."""
    leaves = (state.tokens, state.logprobs, state.lengths, state.prompt_lengths)
    return [completion(model, *row) for row in zip(*map(to_host, leaves), strict=True)]


def completion(
    model: Neo,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    length: int | np.integer,
    prompt_length: int | np.integer,
) -> Completion:
    """Returns what a row holds after its prompt: tokens [S] and their logprobs [S], of a length."""
    ended = length > prompt_length and tokens[length - 1] in model.config.eos_ids
    new = slice(prompt_length, length - 1 if ended else length)
    reason = "eos" if ended else "length"
    return Completion(tokens[new].tolist(), logprobs[new].tolist(), reason)


def stream(
    model: Neo,
    params: Params,
    prompt: Sequence[int],
    max_new_tokens: int,
    settings: Settings,
) -> Iterator[int]:
    """Yields the new tokens of one prompt as they come, the end of text left out.

    Raises:
      NeoError: see `check_prompts`.
    """
    state = start(model, params, [prompt], max_new_tokens, settings)
    for position in range(len(prompt), len(prompt) + max_new_tokens):
        state = run(model, params, state, 1)
        token = int(to_host(state.tokens[0, position]))
        if token in model.config.eos_ids:
            return
        yield token
