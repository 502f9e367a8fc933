"""Log-probabilities of given tokens: rows of any lengths in batches, and texts of any length.

A `Question` says which tokens a model reads, and of which tokens the probability is wanted where.
Only there are logits computed, for the output head is a third of a small model's work; and where
these are few, the last layer too. Rows of like length share a batch; a width has one of few values,
so that few programs are compiled.

A text beyond the context is read by windows. The first holds as many tokens as the context; each
next one begins `stride` tokens later and scores the `stride` tokens that no window has scored
yet, so each of these sees at least `max_length - stride` tokens before the one that predicts it.
Every token but the first is scored exactly once.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import BATCH, LENGTH, VOCAB, Array, Bool, Float, Int, Params
from neo_jax.decode.capacity import round_up, scored_length
from neo_jax.decode.sampling import logprobs_of
from neo_jax.devices.memory import check_batch
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import soft_prompt_ids, text_context
from neo_jax.model.transformer import Neo
from neo_jax.ops import tuning
from neo_jax.sharding.rules import constrain, padded_rows, pick

_LOGITS = 1024  # positions whose logits exist at one time


@dataclasses.dataclass(frozen=True)
class Score:
    """How well the model predicts one text."""

    ids: list[int]
    # Log p of each token after the first, in nats: [len(ids) - 1], but of virtual tokens none.
    logprobs: np.ndarray
    loss: float  # the mean of -logprobs, nats a token
    num_bytes: int  # UTF-8 bytes of the scored tokens; 0 without a tokenizer

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode a byte of the text after its first token; NaN without a tokenizer."""
        if not self.num_bytes:
            return math.nan
        return -float(self.logprobs.sum(dtype=np.float64)) / math.log(2) / self.num_bytes


class Question(NamedTuple):
    """A row of a batch: what a model reads, and of which tokens the probability is wanted."""

    tokens: Sequence[int]  # at most `text_context`
    positions: Sequence[int]  # [K]: behind which of the tokens
    targets: Sequence[int]  # [K]: the next token of each


class Answer(NamedTuple):
    """What the model says to a question."""

    logprobs: np.ndarray  # float32 [K], log p of each target, in nats
    greedy: np.ndarray  # bool [K], whether no token is likelier


def score_rows(
    model: Neo, params: Params, rows: Sequence[Question], batch_size: int = 0
) -> Iterator[tuple[int, Answer]]:
    """Yields the index of each row and its answer, batch by batch, the longest rows first.

    A model with a soft prompt reads it before each row, which is as much shorter than its context.
    A forward pass has `batch_size` rows; 0 is as many as have some thousand tokens together.

    Raises:
      NeoError: see `check_batch`; or the model is a classifier.
    """
    model.config.head.check_writes()
    context, lead = model.config.max_length, soft_prompt_ids(model)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].tokens))
    while order:
        width = scored_length(len(lead) + len(rows[order[0]].tokens), context)
        most = batch_size or max(tuning.forward_tokens(model.sharding) // width, 1)
        batch, order = order[:most], order[most:]
        size = padded_rows(model.sharding, round_up(len(batch), most))
        num_devices = model.sharding.mesh.size if model.sharding else 1
        check_batch(size, width, 4 * width * model.config.embed_dim, num_devices)
        most_targets = round_up(max(len(rows[i].targets) for i in batch))
        tokens = np.zeros((size, width), np.int32)
        positions, targets = np.zeros((2, size, most_targets), np.int32)
        for line, i in enumerate(batch):
            row = rows[i]
            tokens[line, : len(lead) + len(row.tokens)] = [*lead, *row.tokens]
            positions[line, : len(row.targets)] = [len(lead) + i for i in row.positions]
            targets[line, : len(row.targets)] = row.targets
        logprobs, greedy = map(to_host, _forward(model, params, tokens, positions, targets))
        for line, i in enumerate(batch):
            wanted = slice(len(rows[i].targets))
            yield i, Answer(logprobs[line, wanted], greedy[line, wanted])


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
        logits = model.apply(
            {"params": params}, _split(model, hidden[:, block]), method=Neo.unembed
        )
        logprobs.append(logprobs_of(logits, targets[:, block]))
        greedy.append(pick(logits, targets[:, block]) >= jnp.max(logits, axis=-1))
    return jnp.concatenate(logprobs, axis=1), jnp.concatenate(greedy, axis=1)


def _split(model: Neo, hidden: Array) -> Array:
    """Returns hidden states so that each device that shares a sequence forms some of the logits."""
    sharding = model.sharding
    if sharding is None or hidden.shape[1] % sharding.num_shards(LENGTH):
        return hidden
    if set(sharding.mesh_axes(LENGTH)) & set(sharding.mesh_axes(VOCAB)):
        return hidden  # these devices share the vocabulary
    return constrain(sharding, hidden, (BATCH, LENGTH, None), "ln_f's output")


def score_ids(
    model: Neo,
    params: Params,
    texts: Sequence[Sequence[int]],
    stride: int = 0,
    batch_size: int = 0,
) -> Iterator[np.ndarray]:
    """Yields for each text the log-probability of every token after its first, in nats.

    Virtual tokens that a text begins with are in each of its windows, and are not scored.

    Args:
      model: the model.
      params: its parameters.
      texts: ids.
      stride: tokens between windows, where a text is longer than the context; 0 is half of it.
        At the context itself windows share no more than the token that one ends with and the
        next begins with, as lm-evaluation-harness has them.
      batch_size: see `score_rows`.

    Yields:
      float32 [len(text) - 1], less without virtual tokens, in the order of the texts.

    Raises:
      NeoError: a text of no tokens, an id outside the vocabulary, or a stride beyond the context.
    """
    context, vocab = text_context(model), model.config.vocab_size
    stride = stride or context // 2
    if not 0 < stride <= context:
        raise NeoError(f"the stride must lie between 1 and {context}, not {stride}.")
    heads = [_virtual(ids, vocab, model.virtual_tokens) for ids in texts]
    texts = [ids[len(head) :] if head else ids for ids, head in zip(texts, heads, strict=True)]
    for i, ids in enumerate(texts, 1):
        if not len(ids):
            raise NeoError(f"text {i} is empty; there is nothing to score.")
        if len(heads[i - 1]) >= context:
            raise NeoError(f"text {i} has a prefix that leaves the context of {context} no room.")
        if min(ids) < 0 or max(ids) >= vocab:
            raise NeoError(f"text {i} has a token id outside the vocabulary, 0 to {vocab - 1}.")
    for group in _groups(texts):
        rows, places = [], []
        for i in group:
            head, begin = heads[i], 0 if heads[i] else 1  # the first token that is scored
            room = context - len(head)
            for first, scored, stop in _windows(len(texts[i]), room, min(stride, room), begin):
                offset = len(head) - 1 - first
                positions = range(offset + scored, offset + stop)
                read = [*head, *texts[i][first : stop - 1]]
                rows.append(Question(read, positions, texts[i][scored:stop]))
                places.append((i, slice(scored - begin, stop - begin)))
        results = {i: np.empty(len(texts[i]) - (not heads[i]), np.float32) for i in group}
        for row, answer in score_rows(model, params, rows, batch_size):
            i, place = places[row]
            results[i][place] = answer.logprobs
        yield from results.values()


def scored_bytes(tokenizer: Any, text: object, ids: Sequence[int]) -> int:
    """Returns the bytes of a text, given by it or by its ids, behind its first token.

    The tokenizer is a `Tokenizer`, or None, without which they are unknown and 0.
    """
    if tokenizer is None:
        return 0
    whole = text if isinstance(text, str) else tokenizer.decode(ids)
    # A character that the first token leaves unfinished is for the others to predict.
    first = tokenizer.decode(ids[:1]).rstrip("\ufffd")
    return len(whole.encode()) - len(first.encode())


def _virtual(ids: Sequence[int], vocab: int, count: int) -> list[int]:
    """Returns the virtual tokens that a text begins with."""
    real = (i for i, token in enumerate(ids) if not vocab <= token < vocab + count)
    return list(ids[: next(real, len(ids))])


def _windows(length: int, context: int, stride: int, scored: int) -> Iterator[tuple[int, int, int]]:
    """Yields where each window of a text begins, where what it scores begins, and where both end.

    The last token of a window is only predicted: it holds one more than the context.
    """
    stop = min(length, context + 1)
    while scored < length:
        yield max(stop - context - 1, 0), scored, stop
        scored, stop = stop, min(stop + stride, length)


def _groups(texts: Sequence[Sequence[int]]) -> Iterator[range]:
    """Runs of texts that fill some batches: results flow while later texts wait."""
    first = tokens = 0
    for i, ids in enumerate(texts, 1):
        tokens += len(ids)
        if tokens >= 8 * tuning.FORWARD_TOKENS or i == len(texts):
            yield range(first, i)
            first, tokens = i, 0
