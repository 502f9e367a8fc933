"""The engine: prompts of ids in, ids out, by one compiled prefill and one compiled loop.

A `DecodeState` holds a batch of sequences that are being generated. `start` fills its cache with
the prompts; `run` appends up to a number of tokens to every row, in one `while_loop` on the device
that stops as soon as every row is done. A stream is `run` with one token at a time: the same
program. Lengths are rounded up, see `capacity`, so that another prompt rarely compiles again.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.decode.capacity import capacity, padded_length
from neo_jax.decode.options import Settings
from neo_jax.decode.prefill import read
from neo_jax.decode.processors import is_end
from neo_jax.decode.sampling import choose, logprobs_of
from neo_jax.decode.state import CHECKED_STEPS, Alternatives, DecodeState, begin_rows, place
from neo_jax.devices.memory import check_batch
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.soft_prompt import soft_prompt_ids, text_context
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import Loop
from neo_jax.sharding.rules import padded_rows


def check_tokens(model: Neo, tokens: Sequence[int]) -> None:
    """Checks what the device would silently get wrong.

    Raises:
      NeoError: no tokens, an id outside the vocabulary, or more tokens than the context.
    """
    vocab, context = model.config.vocab_size + model.virtual_tokens, text_context(model)
    if not len(tokens):
        raise NeoError("the prompt is empty; give at least one token.")
    for token in tokens:
        if not 0 <= token < vocab:
            raise NeoError(f"token id {token} is not in the vocabulary, 0 to {vocab - 1}.")
    if len(tokens) > context:
        raise NeoError(f"{len(tokens)} tokens exceed the context of {context}; shorten the text.")


def check_prompts(model: Neo, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Checks prompts as `check_tokens` does, and that the context has room for the new tokens.

    Raises:
      NeoError: as that does; or the model is a classifier, or there is no room.
    """
    model.config.head.check_writes()
    if max_new_tokens < 1:
        raise NeoError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    context = text_context(model)
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
    slots = capacity(length + model.soft_prompt, config.max_length)
    row_bytes = caching.sequence_bytes(config, slots, dtype).per_sequence + 4 * config.vocab_size
    check_batch(rows, slots, row_bytes, model.sharding.mesh.size if model.sharding else 1)


def start(
    model: Neo,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
) -> DecodeState:
    """Reads the prompts, each behind the model's soft prompt if it has one, into a fresh state.

    Raises:
      NeoError: see `check_prompts`.
    """
    check_prompts(model, prompts, max_new_tokens)
    prompts = [[*soft_prompt_ids(model), *prompt] for prompt in prompts]
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
    # The newest token is left to the first step, which so is a step like all others.
    cache = read(model, params, tokens, lengths - 1, slots)
    return place(model.sharding, begin_rows(tokens, lengths, limits, settings, cache, slots))


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
    return place(model.sharding, state._replace(cache=restored(state.cache)))


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
    ended = (is_end(token, eos) & ~state.settings.ignore_eos) | (lengths >= state.limits)
    return state._replace(
        tokens=state.tokens.at[rows, where].set(token, mode="drop"),
        logprobs=state.logprobs.at[rows, where].set(logprob, mode="drop"),
        lengths=lengths,
        done=state.done | ended,
        alternatives=_with_alternatives(state, logits[:, 0]),
        cache=cache,
    )


def _with_alternatives(state: DecodeState, logits: Float[Array, "B V"]) -> Alternatives:
    """Returns a state's alternatives with those of the next token, where a row wants any."""
    old, wanted = state.alternatives, state.settings.alternatives
    if not wanted.shape[1]:
        return old

    def add() -> Alternatives:
        logprobs, ids = jax.lax.top_k(jax.nn.log_softmax(logits), wanted.shape[1])
        rows = jnp.arange(wanted.shape[0])
        places = jnp.where(state.done, CHECKED_STEPS, state.lengths % CHECKED_STEPS)
        return Alternatives(
            old.ids.at[rows, places].set(ids, mode="drop"),
            old.logprobs.at[rows, places].set(logprobs, mode="drop"),
        )

    return jax.lax.cond(jnp.any(wanted), add, lambda: old)


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
    leaves = (
        state.tokens, state.logprobs, state.lengths, state.prompt_lengths, state.settings.ignore_eos
    )  # fmt: skip
    return [completion(model, *row) for row in zip(*map(to_host, leaves), strict=True)]


def completion(
    model: Neo,
    tokens: np.ndarray,
    logprobs: np.ndarray,
    length: int | np.integer,
    prompt_length: int | np.integer,
    ignore_eos: bool | np.bool_ = False,
) -> Completion:
    """Returns what a row holds after its prompt: tokens [S] and their logprobs [S], of a length."""
    ended = length > prompt_length and tokens[length - 1] in model.config.eos_ids and not ignore_eos
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
    ends = () if to_host(settings.ignore_eos)[0] else model.config.eos_ids
    state = start(model, params, [prompt], max_new_tokens, settings)
    first = model.soft_prompt + len(prompt)
    for position in range(first, first + max_new_tokens):
        state = run(model, params, state, 1)
        token = int(to_host(state.tokens[0, position]))
        if token in ends:
            return
        yield token
