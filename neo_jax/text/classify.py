"""Labels of texts, by a model whose head is a classifier's; and of answers by their likelihood."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from neo_jax.axes import Array, Float, Int, Params
from neo_jax.decode.capacity import padded_length, round_up
from neo_jax.decode.engine import check_tokens
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.model.heads import head_logits
from neo_jax.model.transformer import Neo
from neo_jax.ops import tuning
from neo_jax.sharding.rules import padded_rows
from neo_jax.text.score import Question, score_rows


@dataclasses.dataclass(frozen=True)
class Classification:
    """What a classifier says of a text."""

    label: str  # the likeliest; of several labels all above one half, joined by commas
    probabilities: np.ndarray  # float32 [C] in the order of the labels; of a regression its number
    logits: np.ndarray  # float32 [C]


def as_one_text(text: Any) -> Any:
    """Returns a pair of texts as the one text that a model reads, on a line each; else as it is."""
    is_pair = isinstance(text, tuple | list) and len(text) == 2
    is_pair = is_pair and all(isinstance(each, str) for each in text)
    return "\n".join(text) if is_pair else text


def classification(logits: np.ndarray, head: HeadConfig) -> Classification:
    """Returns what logits, float32 [C], say of a text."""
    if head.problem_type == "regression":
        return Classification(head.labels[0], logits, logits)
    if head.problem_type == "multi_label_classification":
        probabilities = 1 / (1 + np.exp(-logits))
        named = [label for label, p in zip(head.labels, probabilities, strict=True) if p > 0.5]
        return Classification(",".join(named), probabilities, logits)
    exponents = np.exp(logits - logits.max())
    label = head.labels[int(np.argmax(logits))]
    return Classification(label, exponents / exponents.sum(), logits)


def sequence_logits(
    model: Neo, params: Params, texts: Sequence[Sequence[int]], batch_size: int = 0
) -> np.ndarray:
    """Returns the logits of each text, float32 [N, C].

    Raises:
      NeoError: the model is no classifier of texts; or as `label_logits`.
    """
    head = model.config.head
    head.check_kind("score")
    found = label_logits(model, params, texts, batch_size)
    return np.array(found, np.float32).reshape(len(texts), len(head.labels))


def label_logits(
    model: Neo, params: Params, texts: Sequence[Sequence[int]], batch_size: int = 0
) -> list[np.ndarray]:
    """Returns the logits of labels, float32: of a head `score` [C] a text, of others [T, C].

    Texts of like length share a batch.

    Args:
      model: with a head of labels.
      params: its parameters.
      texts: ids, each within the context.
      batch_size: rows of a forward pass; 0 is as many as have some thousand tokens together.

    Raises:
      NeoError: a text is empty, or has more tokens than the context holds, or one that is none.
    """
    of_texts = model.config.head.kind == "score"
    for ids in texts:
        check_tokens(model, ids)
    found = [np.empty(0, np.float32)] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        width = padded_length(len(texts[order[0]]), model.config.max_length)
        most = batch_size or max(tuning.forward_tokens(model.sharding) // width, 1)
        batch, order = order[:most], order[most:]
        size = padded_rows(model.sharding, round_up(len(batch), most))
        tokens, last = np.zeros((size, width), np.int32), np.zeros((size, 1), np.int32)
        for row, i in enumerate(batch):
            tokens[row, : len(texts[i])] = texts[i]
            last[row] = len(texts[i]) - 1
        logits = to_host(_logits(model, params, tokens, last if of_texts else None))
        for i, rows in zip(batch, logits, strict=False):
            found[i] = rows[0] if of_texts else rows[: len(texts[i])].copy()
    return found


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    model: Neo, params: Params, tokens: Int[Array, "B T"], last: Int[Array, "B 1"] | None
) -> Float[Array, "B K C"]:
    """Padding, on the right, is in the future of what counts."""
    hidden, _ = model.apply({"params": params}, tokens, query_indices=last, method=Neo.hidden)
    return head_logits(model, params, hidden)


def choose(
    model: Neo,
    params: Params,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[Sequence[Sequence[int]]],
    by_length: bool = False,
) -> list[np.ndarray]:
    """Returns for each prompt the log-probability of each of its choices, float32 [choices].

    The likeliest is a language model's answer to a question of multiple choice.

    Args:
      model: a language model.
      params: its parameters.
      prompts: ids.
      choices: for each prompt the ids of what may follow it.
      by_length: divide by the tokens of the choice, so that long ones are no worse.

    Raises:
      NeoError: a prompt or a choice is empty, or both together are beyond the context.
    """
    rows: list[Question] = []
    for prompt, several in zip(prompts, choices, strict=True):
        for choice in several:
            if not len(prompt) or not len(choice):
                raise NeoError("a prompt and a choice have at least a token each.")
            tokens = [*prompt, *choice]
            check_tokens(model, tokens)
            positions = range(len(prompt) - 1, len(tokens) - 1)
            rows.append(Question(tokens[:-1], positions, choice))
    sums = np.empty(len(rows), np.float32)
    for row, answer in score_rows(model, params, rows):
        total = answer.logprobs.sum(dtype=np.float64)
        sums[row] = total / len(answer.logprobs) if by_length else total
    ends = np.cumsum([len(several) for several in choices])
    return np.split(sums, ends[:-1]) if len(ends) else []
