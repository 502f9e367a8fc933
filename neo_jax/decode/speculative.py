"""Speculative decoding: a cheap draft proposes a few tokens, the model judges all in one pass.

A pass reads the newest token and the draft's G in one append to the cache. A drafted token that the
draft drew from q and the model gives p is accepted with probability min(1, p / q); in the place of
the first that is not, a token is drawn from max(p - q, 0), and after G accepted ones from p: so the
text is distributed as without a draft (Leviathan et al., 2023; Chen et al., 2023), p and q being
what the settings make of the logits. For rows of temperature 0 both are the likeliest token, and
the text is the greedy one. Rows accept different numbers: each has its own length and rolls its
caches back to it.

The draft is a smaller model of the same vocabulary, or the text itself: what followed the newest
tokens where they occurred before (Saxena, "Prompt Lookup Decoding", 2023).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Bool, Float, Int, Params
from neo_jax.decode import engine
from neo_jax.decode.engine import Completion
from neo_jax.decode.options import Settings
from neo_jax.decode.processors import History, is_end
from neo_jax.decode.sampling import logprobs_of, processed
from neo_jax.decode.state import DecodeState
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model import cache as caching
from neo_jax.model.cache import SLACK, Cache
from neo_jax.model.soft_prompt import soft_prompt_ids
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import Loop
from neo_jax.sharding.rules import pick

MAX_DRAFTED = SLACK
"""Tokens of a draft: a pass appends one more, and caches have slack for that."""

NUM_DRAFTED = 5
"""Of these, by default."""

LONGEST_MATCH = 3
"""Newest tokens that look-up compares; where fewer have occurred before, those count."""

_DRAFT, _TEST, _FINAL = range(3)  # what a position draws for


class Draft(NamedTuple):
    """A model that proposes tokens."""

    model: Neo
    params: Params


class SpeculativeState(NamedTuple):
    """A batch that is being generated, and how its drafts fared; every leaf leads with batch."""

    text: DecodeState
    cache: Cache  # the draft's; holds every token but the newest one or two; () for look-up
    passes: Int[Array, "B"]  # of the model over this row
    judged: Int[Array, "B"]  # drafted tokens up to the first that was not accepted
    accepted: Int[Array, "B"]


class Acceptance(NamedTuple):
    """How the drafts of one text fared."""

    passes: int  # of the model
    judged: int  # drafted tokens up to the first in each pass that was not accepted
    accepted: int


class _Proposal(NamedTuple):
    tokens: Int[Array, "B G"]
    weights: Float[Array, "B G V"]  # the distribution that each was drawn from
    there: Bool[Array, "B G"]  # False where there is no proposal


def check_draft(model: Neo, draft: Draft | None, num_drafted: int) -> None:
    """Checks that a draft can propose tokens to a model.

    Raises:
      NeoError: other vocabularies, a number of tokens out of range, or a soft prompt of the draft.
    """
    if not 1 <= num_drafted <= MAX_DRAFTED:
        raise NeoError(f"a draft has 1 to {MAX_DRAFTED} tokens, not {num_drafted}.")
    if draft and draft.model.config.vocab_size != model.config.vocab_size:
        raise NeoError(
            f"the draft model has {draft.model.config.vocab_size} tokens and the model "
            f"{model.config.vocab_size}; take a draft with the model's tokenizer."
        )
    if draft and draft.model.virtual_tokens:
        raise NeoError("the draft model has a soft prompt; take the model that it is for.")


def generate(
    model: Neo,
    params: Params,
    draft: Draft | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    settings: Settings,
    num_drafted: int,
) -> tuple[list[Completion], list[Acceptance]]:
    """Completes prompts as `engine.generate` does, in fewer passes over the model's weights.

    The draft proposes `num_drafted` tokens at a time; None looks them up in the text. Prompts are
    ids of any lengths; settings are those of each.

    Returns:
      The completions, and how drafts fared in each.

    Raises:
      NeoError: see `check_draft` and `engine.check_prompts`; the draft's context counts too.
    """
    check_draft(model, draft, num_drafted)
    if not prompts:
        return [], []
    text = engine.start(model, params, prompts, max_new_tokens, settings)
    cache: Cache = ()
    if draft:  # which takes a virtual token for the last one of the vocabulary
        lead, last = soft_prompt_ids(model), model.config.vocab_size - 1
        known = [[min(token, last) for token in (*lead, *prompt)] for prompt in prompts]
        cache = engine.start(*draft, known, max_new_tokens, settings).cache
    counts = (jnp.zeros_like(text.lengths) for _ in range(3))  # `run` consumes each by itself
    state = SpeculativeState(text, cache, *counts)
    state = run(model, draft and draft.model, num_drafted, params, draft and draft.params, state)
    leaves = map(to_host, (state.passes, state.judged, state.accepted))
    fared = [Acceptance(*map(int, row)) for row in zip(*leaves, strict=True)]
    return engine.completions(model, state.text)[: len(prompts)], fared[: len(prompts)]


@functools.partial(Loop, static_argnums=(0, 1, 2), donate_argnums=5)
def run(
    model: Neo,
    draft: Neo | None,
    num_drafted: int,
    params: Params,
    draft_params: Params | None,
    state: SpeculativeState,
) -> SpeculativeState:
    """Appends tokens until every row is done; consumes `state`."""

    def advance(state: SpeculativeState) -> SpeculativeState:
        text = state.text
        if draft is None or draft_params is None:
            proposal = _look_up(text, num_drafted, model.config.padded_vocab_size)
        else:
            eos = model.config.eos_ids
            proposal, cache = _draft(draft, num_drafted, draft_params, text, state.cache, eos)
            state = state._replace(cache=cache)
        return _judge(model, params, state, proposal)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.text.done), advance, state)


def _draft(
    draft: Neo,
    num_drafted: int,
    params: Params,
    text: DecodeState,
    cache: Cache,
    eos: tuple[int, ...],
) -> tuple[_Proposal, Cache]:
    """Lets the draft model continue each row by G tokens."""
    rows = jnp.arange(text.tokens.shape[0])
    variables = {"params": params}

    def propose(carry: tuple[Array, Cache], ahead: Array) -> tuple[tuple[Array, Cache], tuple]:
        tokens, cache = carry
        lengths = text.lengths + ahead
        # The newest two: where all of the last draft was accepted, its last token is still unread.
        # Elsewhere the older is written once more, as it was.
        positions = lengths[:, None] + jnp.array([[-2, -1]])
        hidden, cache = draft.apply(
            variables,
            jnp.take_along_axis(tokens, jnp.clip(positions, 0), axis=1, mode="clip"),
            _readable(positions, text),
            cache,
            method=Neo.hidden,
        )
        logits = draft.apply(variables, hidden[:, 1:], method=Neo.unembed)[:, 0]
        history = History(tokens, lengths, text.prompt_lengths, text.limits)
        weights = _distribution(logits, text.settings, history, eos)
        token = _draw(weights, text.settings, lengths, _DRAFT)
        tokens = tokens.at[rows, lengths].set(token, mode="drop")
        return (tokens, cache), (token, weights)

    (_, cache), drawn = jax.lax.scan(propose, (text.tokens, cache), jnp.arange(num_drafted))
    tokens, weights = (x.swapaxes(0, 1) for x in drawn)
    return _Proposal(tokens, weights, jnp.ones(tokens.shape, bool)), cache


def _look_up(text: DecodeState, num_drafted: int, vocab: int) -> _Proposal:
    """Continues each row as it went on where its newest tokens last occurred."""
    tokens, lengths = text.tokens, text.lengths[:, None]
    indices = jnp.arange(tokens.shape[1])[None]
    match = jnp.zeros(tokens.shape, jnp.int32)  # how many tokens before an index are the newest
    whole = (indices > 0) & (indices < lengths)
    for back in range(1, LONGEST_MATCH + 1):
        newest = jnp.take_along_axis(tokens, jnp.maximum(lengths - back, 0), axis=1)
        whole &= (indices >= back) & (jnp.roll(tokens, back, axis=1) == newest)
        match += whole
    # The longest match, and of these the latest.
    best = jnp.argmax(match * tokens.shape[1] + indices * (match > 0), axis=1)[:, None]
    found = jnp.take_along_axis(match, best, axis=1) > 0
    # What follows may be shorter than the draft: then it is taken to repeat itself.
    ahead = jnp.arange(num_drafted)[None] % jnp.maximum(lengths - best, 1)
    proposed = jnp.take_along_axis(tokens, best + ahead, axis=1)
    weights = jax.nn.one_hot(proposed, vocab)
    return _Proposal(proposed, weights, found & (proposed < vocab))


def _judge(
    model: Neo, params: Params, state: SpeculativeState, proposal: _Proposal
) -> SpeculativeState:
    """Reads the newest token and the drafted ones, and appends what is accepted and one more."""
    text, eos = state.text, model.config.eos_ids
    batch, num_drafted = proposal.tokens.shape
    rows = jnp.arange(batch)[:, None]
    ahead = jnp.arange(num_drafted + 1)[None]
    places = text.lengths[:, None] + ahead  # of the drafted tokens, and of one more

    newest = jnp.take_along_axis(text.tokens, text.lengths[:, None] - 1, axis=1)
    read = jnp.concatenate([newest, proposal.tokens], axis=1)
    logits, cache = engine.apply(model, params, read, _readable(places - 1, text), text.cache)
    p = _distributions(logits, text, proposal, places, eos)

    there = proposal.there & (places < text.limits[:, None])[:, :-1]
    q = jnp.where(there[..., None], proposal.weights, 0)
    p_drafted, q_drafted = (pick(x, proposal.tokens) for x in (p[:, :-1], q))
    uniform = _uniform(text.settings, places[:, :-1])
    accepts = there & (uniform * q_drafted < p_drafted)
    accepted = jnp.sum(jnp.cumprod(accepts, axis=1), axis=1)

    # After the last drafted token q is 0, and what is left of p is p.
    left = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0)
    left, whole = (jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0] for x in (left, p))
    is_left = jnp.any(left > 0, axis=1, keepdims=True)
    left = jnp.where(is_left, left, whole)  # p = q but for rounding
    final = _draw(left, text.settings, text.lengths + accepted, _FINAL)
    padded = jnp.pad(proposal.tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(ahead == accepted[:, None], final[:, None], padded)

    # Cut after an end of text, and where there is no more room.
    new = (ahead <= accepted[:, None]) & (places < text.limits[:, None]) & ~text.done[:, None]
    ends = new & is_end(tokens, eos) & ~text.settings.ignore_eos[:, None]
    new &= jnp.cumsum(ends, axis=1) - ends == 0
    count = jnp.sum(new, axis=1)
    where = jnp.where(new, places, text.tokens.shape[1])
    lengths = text.lengths + count
    logprobs = logprobs_of(logits, tokens)
    judged = jnp.minimum(jnp.minimum(accepted + 1, jnp.sum(there, axis=1)), count)
    return SpeculativeState(
        text=text._replace(
            tokens=text.tokens.at[rows, where].set(tokens, mode="drop"),
            logprobs=text.logprobs.at[rows, where].set(logprobs, mode="drop"),
            lengths=lengths,
            done=text.done | jnp.any(new & ends, axis=1) | (lengths >= text.limits),
            cache=caching.rollback(cache, lengths - 1),
        ),
        cache=caching.rollback(state.cache, lengths - 1),
        passes=state.passes + ~text.done,
        judged=state.judged + judged,
        accepted=state.accepted + jnp.minimum(accepted, count),
    )


def _readable(positions: Int[Array, "B T"], text: DecodeState) -> Int[Array, "B T"]:
    """Hides what is beyond the limit of a row, and rows that are done."""
    there = (positions < text.limits[:, None]) & ~text.done[:, None]
    return jnp.where(there, positions, -1)


def _distributions(
    logits: Float[Array, "B T V"],
    text: DecodeState,
    proposal: _Proposal,
    places: Int[Array, "B T"],
    eos: tuple[int, ...],
) -> Float[Array, "B T V"]:
    """Returns the distribution of the token at each place, the drafted ones before it given."""
    batch, count = places.shape
    rows = jnp.arange(batch)[:, None]
    tokens = text.tokens.at[rows, places[:, :-1]].set(proposal.tokens, mode="drop")
    repeated = jax.tree.map(
        lambda leaf: jnp.repeat(leaf, count, axis=0),
        (text.settings, text._replace(tokens=tokens).history),
    )
    settings, history = repeated
    history = history._replace(lengths=places.reshape(-1))
    weights = _distribution(logits.reshape(batch * count, -1), settings, history, eos)
    return weights.reshape(logits.shape)


def _distribution(
    logits: Float[Array, "B V"], settings: Settings, history: History, eos: tuple[int, ...]
) -> Float[Array, "B V"]:
    """Returns what the next token is drawn from; at temperature 0 the likeliest has it all."""
    logits = processed(logits, settings, history, eos)
    likeliest = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jnp.where(settings.temperature[:, None] > 0, jax.nn.softmax(logits), likeliest)


def _key(seed: Array, position: Array, purpose: int) -> Array:
    # Each is used once: no token that is kept depends on what was drawn for a place beyond it.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), position), purpose)


def _draw(
    weights: Float[Array, "B V"], settings: Settings, positions: Int[Array, "B"], purpose: int
) -> Int[Array, "B"]:
    """Draws a token of each row with probabilities in proportion to the weights."""

    def draw(seed: Array, position: Array, weights: Array) -> Array:
        return jax.random.categorical(_key(seed, position, purpose), jnp.log(weights))

    return jax.lax.cond(
        jnp.any(settings.temperature > 0),
        lambda: jax.vmap(draw)(settings.seed, positions, weights).astype(jnp.int32),
        lambda: jnp.argmax(weights, axis=-1).astype(jnp.int32),
    )


def _uniform(settings: Settings, positions: Int[Array, "B G"]) -> Float[Array, "B G"]:
    def draw(seed: Array, position: Array) -> Array:
        return jax.random.uniform(_key(seed, position, _TEST))

    return jax.vmap(jax.vmap(draw, (None, 0)))(settings.seed, positions)
