"""Beam search: the texts of highest log-probability that a few parallel searches find.

Every prompt has K beams. A step looks at every token after every beam and takes the 2 K likeliest
texts, or (1 + E) K where E > 1 tokens end a text: at least K of them do not end, and go on. Of the
K likeliest, those that end are finished, and the K best finished ones are kept by score: the sum of
the log-probabilities of the new tokens, the end of text included, over their number to the power of
the length penalty. Scores, and when a search is over, are those of transformers, so that both find
the same texts.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Bool, Float, Int, Params
from neo_jax.decode import engine
from neo_jax.decode.engine import DecodeState, completion
from neo_jax.decode.sampling import Settings, is_end, processed
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError, check_numbers
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import Loop

_MOST_PENALTY = 100.0  # of either sign: what lengths to its power do to scores, float32 holds


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """What a user says about beam search.

    Raises:
      NeoError: a value is out of its range.
    """

    num_beams: int = 1  # texts that are searched side by side; 1 draws samples instead
    length_penalty: float = 1.0  # scores are divided by length to this power: above 0 favours long
    # where a search with all its texts finished is over: True at once; False when the best of the
    # others, as long as it is now, is no better; never when it cannot become better
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.num_beams < 1:
            raise NeoError(f"num_beams must be at least 1, not {self.num_beams}.")
        if not abs(self.length_penalty) <= _MOST_PENALTY:
            raise NeoError(
                f"length_penalty must lie between -{_MOST_PENALTY} and {_MOST_PENALTY}, not be "
                f"{self.length_penalty}."
            )
        if self.early_stopping not in (True, False, "never"):
            raise NeoError(
                f"early_stopping must be True, False or 'never', not {self.early_stopping!r}."
            )


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

    With one beam this is greedy decoding.

    Args:
      model: the model.
      params: its parameters.
      prompts: ids, of any lengths.
      max_new_tokens: where to stop at the latest.
      options: of all prompts.
      settings: of each prompt; temperature 0, for a search draws nothing. Penalties count.
      num_return: how many a prompt, at most num_beams.

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
    return [_beams(model, prompt, found, row, num_return) for row, prompt in enumerate(prompts)]


def _beams(model: Neo, prompt: Sequence[int], found: Texts, row: int, count: int) -> list[Beam]:
    beams = []
    for beam in range(count):
        score = float(found.scores[row, beam])
        if score == -math.inf:  # what the penalties left ended before there were so many
            break
        length, eos = int(found.lengths[row, beam]), model.config.eos_ids
        tokens, logprobs = (np.asarray(x[row, beam]) for x in (found.tokens, found.logprobs))
        beams.append(Beam(*completion(tokens, logprobs, length, len(prompt), eos), score))
    return beams


@functools.partial(Loop, static_argnums=(0, 1))
def run(model: Neo, beams: int, params: Params, state: DecodeState, rule: Rule) -> Texts:
    """Searches from a row for each prompt until every search is over; returns what it found."""
    rows, room = state.tokens.shape
    nothing = jnp.full((rows, beams), -jnp.inf)
    searches = BeamState(
        running=jax.tree.map(lambda leaf: jnp.repeat(leaf, beams, axis=0), state),
        sums=nothing.at[:, 0].set(0.0),  # at first all beams are one
        finished=Texts(
            jnp.zeros((rows, beams, room), jnp.int32),
            jnp.zeros((rows, beams, room), jnp.float32),
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
    rows, newest = jnp.arange(batch * beams), running.lengths - 1
    variables = {"params": params}
    hidden, cache = model.apply(
        variables,
        running.tokens[rows, newest][:, None],
        newest[:, None],
        running.cache,
        method=Neo.hidden,
    )
    logits = model.apply(variables, hidden, method=Neo.unembed)[:, 0]
    logprobs = jax.nn.log_softmax(logits)
    vocab = logprobs.shape[-1]
    scored = processed(logprobs, running.settings, running.history, eos)
    sums = (state.sums[..., None] + scored.reshape(batch, beams, vocab)).reshape(batch, -1)

    sums, index = jax.lax.top_k(sums, count)
    parents = jnp.arange(batch)[:, None] * beams + index // vocab  # rows of `running`
    tokens = index % vocab
    places = running.lengths[parents]
    slots = jnp.arange(running.tokens.shape[1])[None, None] == places[..., None]
    candidates = Texts(
        jnp.where(slots, tokens[..., None], running.tokens[parents]),
        jnp.where(slots, logprobs[parents, tokens][..., None], running.logprobs[parents]),
        places + 1,
        sums,
    )
    num_new = candidates.lengths - running.prompt_lengths[parents]
    ended = is_end(tokens, eos) | (candidates.lengths >= running.limits[parents])

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
