"""Log-probabilities of given tokens, of any length, by windows over the context.

The first window holds the first `max_length` tokens; each next one begins `stride` tokens later
and scores the `stride` tokens that no window has scored yet, so each of these sees at least
`max_length - stride` tokens before it. Every token but the first is scored exactly once.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.decode.engine import bucket
from neo_jax.decode.sampling import logprobs_of
from neo_jax.distributed import to_host
from neo_jax.errors import NeoError
from neo_jax.model import Neo
from neo_jax.sharding import padded_rows

_MIN_LENGTH = 16
_POSITIONS = 256  # whose logits exist at one time
_BATCH_TOKENS = 8192  # of one forward pass


class _Window(NamedTuple):
    text: int
    first: int  # the token that the window begins with
    scored: int  # the first token that it scores
    stop: int


def token_logprobs(
    model: Neo, params: Params, texts: Sequence[Sequence[int]], stride: int = 0
) -> Iterator[np.ndarray]:
    """Yields for each text the log-probability of every token after its first, in nats.

    Args:
      model: the model.
      params: its parameters.
      texts: ids.
      stride: tokens between windows, where a text is longer than the context; 0 is half of it.

    Yields:
      float32 [len(text) - 1], in the order of the texts.

    Raises:
      NeoError: a text of no tokens, an id outside the vocabulary, or a stride beyond the context.
    """
    context = model.config.max_length
    stride = stride or context // 2
    if not 0 < stride < context:
        raise NeoError(f"the stride must lie between 1 and {context - 1}, not {stride}.")
    _check(texts, model.config.vocab_size)
    for group in _groups(texts):
        windows = [w for i in group for w in _windows(i, len(texts[i]), context, stride)]
        results = {i: np.empty(len(texts[i]) - 1, np.float32) for i in group}
        for batch in _batches(windows):
            width = bucket(max(w.stop - w.first for w in batch), _MIN_LENGTH, context)
            rows = bucket(len(batch), 1, max(_BATCH_TOKENS // width, 1))
            rows = padded_rows(model.sharding, rows)
            tokens = np.zeros((rows, width), np.int32)
            for row, w in zip(tokens, batch, strict=False):
                row[: w.stop - w.first] = texts[w.text][w.first : w.stop]
            logprobs = to_host(_logprobs(model, params, tokens))
            for row, w in zip(logprobs, batch, strict=False):
                scored = row[w.scored - 1 - w.first : w.stop - 1 - w.first]
                results[w.text][w.scored - 1 : w.stop - 1] = scored
        yield from (results[i] for i in group)


def _check(texts: Sequence[Sequence[int]], vocab: int) -> None:
    for i, ids in enumerate(texts):
        if not len(ids):
            raise NeoError(f"text {i + 1} is empty; there is nothing to score.")
        if min(ids) < 0 or max(ids) >= vocab:
            raise NeoError(f"text {i + 1} has a token id outside the vocabulary, 0 to {vocab - 1}.")


def _windows(text: int, length: int, context: int, stride: int) -> Iterator[_Window]:
    stop = min(length, context)
    yield _Window(text, 0, 1, stop)
    while stop < length:
        scored, stop = stop, min(stop + stride, length)
        yield _Window(text, max(stop - context, 0), scored, stop)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Runs of texts that fill some batches: results flow while later texts wait."""
    first = tokens = 0
    for i, ids in enumerate(texts):
        tokens += len(ids)
        if tokens >= 8 * _BATCH_TOKENS:
            yield range(first, i + 1)
            first, tokens = i + 1, 0
    if first < len(texts):
        yield range(first, len(texts))


def _batches(windows: list[_Window]) -> Iterator[list[_Window]]:
    """Groups windows of like length, so that little is padded."""
    windows = sorted(windows, key=lambda w: w.first - w.stop)
    while windows:
        width = bucket(windows[0].stop - windows[0].first, _MIN_LENGTH, 1 << 30)
        rows = max(_BATCH_TOKENS // width, 1)
        yield windows[:rows]
        windows = windows[rows:]


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(model: Neo, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T-1"]:
    variables = {"params": params}
    hidden, _ = model.apply(variables, tokens, method=Neo.encode)
    hidden, targets = hidden[:, :-1], tokens[:, 1:]

    # A block of positions at a time: all logits at once would be the largest array by far.
    blocks = []
    for start in range(0, targets.shape[1], _POSITIONS):
        block = slice(start, start + _POSITIONS)
        logits = model.apply(variables, hidden[:, block], method=Neo.unembed)
        blocks.append(logprobs_of(logits, targets[:, block]))
    return jnp.concatenate(blocks, axis=1)
