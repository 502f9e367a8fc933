"""Beam search: the texts of highest log-probability that a few parallel searches find.

Every prompt has K beams. A step looks at every token after every beam and takes the 2 K likeliest
texts, or (1 + E) K where E > 1 tokens end a text: at least K of them do not end, and go on. Of the
K likeliest, those that end are finished, and the K best finished ones are kept by score: the sum of
the log-probabilities of the new tokens, the end of text included, over their number to the power of
the length penalty. Scores, and when a search is over, are those of transformers, so that both find
the same texts.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Bool, Float, Int, Params
from neo_jax.decode import engine
from neo_jax.decode.options import BeamOptions, Settings
from neo_jax.decode.processors import is_end
from neo_jax.decode.sampling import processed
from neo_jax.decode.state import DecodeState
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import Loop


class Rule(NamedTuple):
    """How scores are formed and when a search is over; values that share one program."""

    length_penalty: Float[Array, ""]
    at_once: Bool[Array, ""]  # as soon as all texts are finished
    hopeful: Bool[Array, ""]  # compare with the best that could still come


class Texts(NamedTuple):
    """The K finished texts of each prompt, best first."""

    tokens: Int[Array, "B K S"]
    logprobs: Float[Array, "B K S"]
    lengths: Int[Array, "B K"]
    scores: Float[Array, "B K"]  # -inf where there is none yet


class BeamState(NamedTuple):
    """Searches under way; every leaf leads with batch, in `running` with batch times beams."""

    running: DecodeState  # the beams, prompt after prompt, the likeliest of each first
    sums: Float[Array, "B K"]  # log-probability of the new tokens of each
    finished: Texts
    done: Bool[Array, "B"]


class Beam(NamedTuple):
    """One text that was found."""

    ids: list[int]  # new tokens, the end of text left out
    logprobs: list[float]  # the model's log p of each, in nats
    finish_reason: str  # "eos", or "length" where max_new_tokens were reached
    score: float  # the sum of log p, the end of text's too, over length to the penalty


def search(
    model: Neo,
    params: Params,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    options: BeamOptions,
    settings: Settings,
    num_return: int = 1,
) -> list[list[Beam]]:
    """Returns the best continuations of each prompt, best first.

    With one beam this is greedy decoding. Settings are those of each prompt, of temperature 0, for
    a search draws nothing; penalties count. At most `num_beams` texts a prompt can be returned.

    Raises:
      NeoError: more are to be returned than there are beams, or more beams than half the
        vocabulary; and see `engine.check_prompts`.
    """
    beams = options.num_beams
    if not 1 <= num_return <= beams:
        raise NeoError(f"{num_return} texts of {beams} beams cannot be returned; raise num_beams.")
    if _per_beam(model) * beams > model.config.vocab_size:
        raise NeoError(f"{beams} beams are too many for {model.config.vocab_size} tokens.")
    if not prompts:
        return []
    state = engine.start(model, params, prompts, max_new_tokens, settings)
    rule = Rule(
        jnp.float32(options.length_penalty),
        # One beam has one text to finish, the greedy one.
        jnp.bool_(options.early_stopping is True or beams == 1),
        jnp.bool_(options.early_stopping == "never" and options.length_penalty > 0),
    )
    found = jax.tree.map(to_host, run(model, beams, params, state, rule))
    endless = to_host(settings.ignore_eos)
    return [
        [
            Beam(
                *engine.completion(model, tokens, logprobs, length, start, endless[row]),
                float(score),
            )
            for tokens, logprobs, length, score in zip(
                *(leaf[row, :num_return] for leaf in found), strict=True
            )
            if score > -math.inf  # what the penalties left ended before there were so many
        ]
        for row, start in enumerate(model.soft_prompt + len(prompt) for prompt in prompts)
    ]


@functools.partial(Loop, static_argnums=(0, 1))
def run(model: Neo, beams: int, params: Params, state: DecodeState, rule: Rule) -> Texts:
    """Searches from a row for each prompt until every search is over; returns what it found."""
    rows, slots = state.tokens.shape
    nothing = jnp.full((rows, beams), -jnp.inf)
    searches = BeamState(
        running=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), state),
        sums=nothing.at[:, 0].set(0.0),  # at first all beams are one
        finished=Texts(
            jnp.zeros((rows, beams, slots), jnp.int32),
            jnp.zeros((rows, beams, slots), jnp.float32),
            jnp.zeros((rows, beams), jnp.int32),
            nothing,
        ),
        done=state.done,
    )
    searches = jax.lax.while_loop(
        lambda searches: ~jnp.all(searches.done),
        lambda searches: _step(model, params, rule, searches),
        searches,
    )
    return searches.finished


def _step(model: Neo, params: Params, rule: Rule, state: BeamState) -> BeamState:
    """Reads the newest token of every beam and takes the best of all that may follow."""
    running, eos = state.running, model.config.eos_ids
    batch, beams = state.sums.shape
    count = _per_beam(model) * beams
    logits, cache = engine.next_logits(model, params, running)
    logprobs = jax.nn.log_softmax(logits[:, 0])
    vocab = logprobs.shape[-1]
    scored = processed(logprobs, running.settings, running.history, eos)
    sums = (state.sums[..., None] + scored.reshape(batch, beams, vocab)).reshape(batch, -1)

    sums, index = jax.lax.top_k(sums, count)
    parents = jnp.arange(batch)[:, None] * beams + index // vocab  # rows of `running`
    tokens = index % vocab
    places = running.lengths[parents]
    here = jnp.arange(running.tokens.shape[1])[None, None] == places[..., None]
    candidates = Texts(
        jnp.where(here, tokens[..., None], running.tokens[parents]),
        jnp.where(here, logprobs[parents, tokens][..., None], running.logprobs[parents]),
        places + 1,
        sums,
    )
    num_new = candidates.lengths - running.prompt_lengths[parents]
    ends = is_end(tokens, eos) & ~running.settings.ignore_eos[parents]
    ended = ends | (candidates.lengths >= running.limits[parents])

    finishes = ended & (jnp.arange(count) < beams)[None] & ~state.done[:, None]
    scores = sums / _power(num_new, rule.length_penalty)
    both = jax.tree.map(
        lambda old, new: jnp.concatenate([old, new], axis=1),
        state.finished,
        candidates._replace(scores=jnp.where(finishes, scores, -jnp.inf)),
    )
    finished = _take(both, jax.lax.top_k(both.scores, beams)[1])

    sums, chosen = jax.lax.top_k(jnp.where(ended, -jnp.inf, sums), beams)
    going_on = _take((parents, candidates), chosen)
    parents, texts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), going_on)
    running = jax.tree.map(lambda leaf: leaf[parents], running._replace(cache=cache))
    running = running._replace(tokens=texts.tokens, logprobs=texts.logprobs, lengths=texts.lengths)

    # All lengths of a search grow together, and its limits are one.
    num_new = num_new[:, 0]
    most = (running.limits - running.prompt_lengths).reshape(batch, beams)[:, 0]
    best = sums[:, 0] / _power(jnp.where(rule.hopeful, most, num_new), rule.length_penalty)
    worst = finished.scores[:, -1]
    over = (num_new >= most) | (best <= worst) | (rule.at_once & (worst > -jnp.inf))
    return BeamState(running, sums, finished, state.done | over)


def _per_beam(model: Neo) -> int:
    """Candidates for each beam, of which one does not end."""
    return max(2, 1 + len(model.config.eos_ids))


def _power(lengths: Int[Array, "..."], exponent: Float[Array, ""]) -> Float[Array, "..."]:
    return jnp.power(lengths.astype(jnp.float32), jnp.full(lengths.shape, exponent))


def _take(tree: Any, index: Int[Array, "B K"]) -> Any:
    """Picks by index along the second axis of every leaf."""

    def pick(leaf: Array) -> Array:
        return jnp.take_along_axis(leaf, index.reshape(*index.shape, *[1] * (leaf.ndim - 2)), 1)

    return jax.tree.map(pick, tree)
