"""Log-probabilities of given tokens: rows of any lengths in batches, and texts of any length.

A `Row` says which tokens a model reads, and of which tokens the probability is asked where.
Only there are logits computed, for the output head is a third of a small model's work; and where
these are few, the last layer too. Rows of like length share a batch; a width has one of few values,
so that few programs are compiled.

A text beyond the context is read by windows. The first holds as many tokens as the context; each
next one begins `stride` tokens later and scores the `stride` tokens that no window has scored
yet, so each of these sees at least `max_length - stride` tokens before the one that predicts it.
Every token but the first is scored exactly once.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Bool, Float, Int, Params
from neo_jax.decode.engine import bucket
from neo_jax.decode.sampling import logprobs_of
from neo_jax.devices.memory import check_batch
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError, checked
from neo_jax.model.transformer import Neo
from neo_jax.ops import tuning
from neo_jax.sharding.rules import padded_rows, pick

_STEP = 16  # widths are multiples of this, and of an eighth of the next power of two
_LOGITS = 1024  # positions whose logits exist at one time


class Row(NamedTuple):
    """What a model reads at once, and what is asked of it."""

    tokens: Sequence[int]  # at most as many as the context
    positions: Sequence[int]  # [K]: behind which of the tokens
    targets: Sequence[int]  # [K]: the next token, of which the probability is asked


class Answer(NamedTuple):
    """What a row was asked for."""

    logprobs: np.ndarray  # float32 [K], log p of each target, in nats
    greedy: np.ndarray  # bool [K], whether no token is likelier


def score_rows(
    model: Neo, params: Params, rows: Sequence[Row], batch_size: int = 0
) -> Iterator[tuple[int, Answer]]:
    """Yields the index of each row and its answer, batch by batch, the longest rows first.

    Args:
      model: the model.
      params: its parameters.
      rows: what to read and to ask.
      batch_size: rows of a forward pass; 0 is as many as have some thousand tokens together.

    Raises:
      NeoError: see `check_batch`.
    """
    context = model.config.max_length
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    while order:
        width = width_of(len(rows[order[0]].tokens), context)
        most = batch_size or max(tuning.forward_tokens(model.sharding) // width, 1)
        batch, order = order[:most], order[most:]
        size = padded_rows(model.sharding, bucket(len(batch), 1, most))
        num_devices = model.sharding.mesh.size if model.sharding else 1
        check_batch(size, width, 4 * width * model.config.embed_dim, num_devices)
        asked = bucket(max(len(rows[i].targets) for i in batch), 1, 1 << 30)
        tokens = np.zeros((size, width), np.int32)
        positions, targets = np.zeros((2, size, asked), np.int32)
        for line, i in enumerate(batch):
            row = rows[i]
            tokens[line, : len(row.tokens)] = row.tokens
            positions[line, : len(row.targets)] = row.positions
            targets[line, : len(row.targets)] = row.targets
        logprobs, greedy = map(to_host, _forward(model, params, tokens, positions, targets))
        for line, i in enumerate(batch):
            asked_here = len(rows[i].targets)
            yield i, Answer(logprobs[line, :asked_here], greedy[line, :asked_here])


def width_of(length: int, context: int) -> int:
    """Returns the width of a batch whose longest row has so many tokens."""
    step = max(_STEP, (1 << (length - 1).bit_length()) // 8)
    return min(-(-length // step) * step, context)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B K"],
    targets: Int[Array, "B K"],
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    # Of many positions the attention would write out all logits: then each is computed.
    query_indices = positions if positions.shape[1] <= tokens.shape[1] // 4 else None
    hidden, _ = model.apply(
        {"params": params}, tokens, query_indices=query_indices, method=Neo.hidden
    )
    if query_indices is None:
        hidden = jnp.take_along_axis(hidden, positions[..., None], axis=1, mode="clip")
    return judge(model, params, hidden, targets)


def judge(
    model: Neo, params: Params, hidden: Float[Array, "B K D"], targets: Int[Array, "B K"]
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """Returns log p of each target after ln_f's output, and whether no token is likelier."""
    # A block of positions at a time: all logits at once would be the largest array by far.
    size = max(_LOGITS // targets.shape[0], 1)
    logprobs, greedy = [], []
    for start in range(0, targets.shape[1], size):
        block = slice(start, start + size)
        logits = model.apply({"params": params}, hidden[:, block], method=Neo.unembed)
        logprobs.append(logprobs_of(logits, targets[:, block]))
        greedy.append(pick(logits, targets[:, block]) >= jnp.max(logits, axis=-1))
    return jnp.concatenate(logprobs, axis=1), jnp.concatenate(greedy, axis=1)


class _Window(NamedTuple):
    text: int
    first: int  # the token that the window begins with
    scored: int  # the first token that it scores
    stop: int


def token_logprobs(
    model: Neo,
    params: Params,
    texts: Sequence[Sequence[int]],
    stride: int = 0,
    batch_size: int = 0,
) -> Iterator[np.ndarray]:
    """Yields for each text the log-probability of every token after its first, in nats.

    Args:
      model: the model.
      params: its parameters.
      texts: ids.
      stride: tokens between windows, where a text is longer than the context; 0 is half of it.
        At the context itself windows share no more than the token that one ends with and the
        next begins with, as lm-evaluation-harness has them.
      batch_size: see `score_rows`.

    Yields:
      float32 [len(text) - 1], in the order of the texts.

    Raises:
      NeoError: a text of no tokens, an id outside the vocabulary, or a stride beyond the context.
    """
    context = model.config.max_length
    stride = checked("stride", stride, int) or context // 2
    if not 0 < stride <= context:
        raise NeoError(f"the stride must lie between 1 and {context}, not {stride}.")
    _check(texts, model.config.vocab_size)
    for group in _groups(texts):
        windows = [w for i in group for w in _windows(i, len(texts[i]), context, stride)]
        results = {i: np.empty(len(texts[i]) - 1, np.float32) for i in group}
        rows = [_row(texts[w.text], w) for w in windows]
        for i, answer in score_rows(model, params, rows, batch_size):
            w = windows[i]
            results[w.text][w.scored - 1 : w.stop - 1] = answer.logprobs
        yield from (results[i] for i in group)


def _check(texts: Sequence[Sequence[int]], vocab: int) -> None:
    for i, ids in enumerate(texts):
        if not len(ids):
            raise NeoError(f"text {i + 1} is empty; there is nothing to score.")
        if min(ids) < 0 or max(ids) >= vocab:
            raise NeoError(f"text {i + 1} has a token id outside the vocabulary, 0 to {vocab - 1}.")


def _windows(text: int, length: int, context: int, stride: int) -> Iterator[_Window]:
    """The last token of a window is only predicted: it holds one more than the context."""
    if length == 1:
        return
    stop = min(length, context + 1)
    yield _Window(text, 0, 1, stop)
    while stop < length:
        scored, stop = stop, min(stop + stride, length)
        yield _Window(text, max(stop - context - 1, 0), scored, stop)


def _row(ids: Sequence[int], window: _Window) -> Row:
    asked = range(window.scored - 1 - window.first, window.stop - 1 - window.first)
    targets = ids[window.scored : window.stop]
    return Row(ids[window.first : window.stop - 1], asked, targets)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Runs of texts that fill some batches: results flow while later texts wait."""
    first = tokens = 0
    for i, ids in enumerate(texts):
        tokens += len(ids)
        if tokens >= 8 * tuning.FORWARD_TOKENS:
            yield range(first, i + 1)
            first, tokens = i + 1, 0
    if first < len(texts):
        yield range(first, len(texts))
