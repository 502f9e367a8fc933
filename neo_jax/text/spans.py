"""Words of texts and answers in texts: which tokens they are, and what a model says of them.

A word is known by its first token, as is usual in transformers' examples; the tokens after it have
no label. An answer is a span of the tokens of its context, which follows the question on a line of
its own, so that all of the context is read with the question in mind.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from neo_jax.axes import Params
from neo_jax.errors import NeoError, brief
from neo_jax.model.transformer import Neo
from neo_jax.text.classify import as_one_text, label_logits
from neo_jax.text.tokenizer import Tokenizer

NO_LABEL = -100
"""The label of a token that has none, as transformers has it."""

LONGEST_ANSWER = 30
"""Tokens of an answer at most, as in transformers' examples of SQuAD."""


class WordLabel(NamedTuple):
    """What a classifier of words says of one."""

    word: str
    label: str  # the likeliest
    probability: float


class FoundAnswer(NamedTuple):
    """The part of a context that answers a question best."""

    text: str
    start: int  # the character of the context at which it begins
    end: int  # and that behind it
    probability: float  # that it begins there times that it ends there, each over the context


class TokenEnds:
    """Where the tokens of texts end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Knows no token yet: each is looked up once."""
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def __call__(self, text: str, ids: Sequence[int]) -> np.ndarray:
        """Returns for each token how many characters of its text begin in it or before, int64 [T].

        So `np.searchsorted(ends, i, side="right")` is the token in which character i begins.

        Raises:
          NeoError: the tokenizer changes the text, so that its tokens have no place in it.
        """
        pieces, raw = [self._piece(token) for token in ids], text.encode()
        joined = b"".join(pieces)
        lead = len(joined) - len(raw)  # SentencePiece puts a space in front
        if lead < 0 or joined[lead:] != raw or joined[:lead].strip():
            raise NeoError(
                f"the tokenizer changes the text {brief(text)}, so that its words have no place; "
                "take one that keeps texts as they are, such as gpt-neo-125m's."
            )
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64) - lead
        if len(raw) == len(text):
            return ends
        begins = np.cumsum([0, *(len(char.encode()) for char in text[:-1])])
        return np.searchsorted(begins, ends)

    def _piece(self, token: int) -> bytes:
        if token not in self._known:
            found = self._tokenizer.token_bytes(token)
            self._known[token] = found or self._tokenizer.token_name(token).encode()
        return self._known[token]


def join_words(words: Sequence[str]) -> tuple[str, list[int]]:
    """Returns the text of words, a space between them, and the character at which each begins."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    return " ".join(words), starts.tolist()


def join_question(question: str, context: str) -> tuple[str, int]:
    """Returns a question and its context as one text, and at which character the latter begins."""
    return as_one_text((question, context)), len(question) + 1


def best_span(logits: np.ndarray, first: int, longest: int) -> tuple[int, int, float]:
    """Returns the first and the last token of the likeliest answer, and its probability.

    Args:
      logits: [T, 2], of start and end.
      first: the token at which the context begins, one of them.
      longest: tokens that an answer has at most.
    """
    scores = logits[first:].astype(np.float64)
    scores -= scores.max(axis=0)
    scores -= np.log(np.exp(scores).sum(axis=0))
    ends = np.pad(scores[:, 1], (0, longest - 1), constant_values=-np.inf)
    pairs = scores[:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)
    start, more = divmod(int(np.argmax(pairs)), longest)
    return first + start, first + start + more, float(np.exp(pairs[start, more]))


def label_words(
    model: Neo, params: Params, tokenizer: Tokenizer, texts: Sequence[str | Sequence[str]]
) -> list[list[WordLabel]]:
    """Returns what a classifier of words says of each word of texts.

    Args:
      model: with a head `classifier`.
      params: its parameters.
      tokenizer: the model's.
      texts: each a text, whose words are what stands between spaces, or a list of words.

    Raises:
      NeoError: the model is no classifier of words, a text has no words, a word is empty, or more
        tokens than the context holds.
    """
    head = model.config.head
    head.check_kind("classifier")
    many, ends_of = [_words(text) for text in texts], TokenEnds(tokenizer)
    joined = [join_words(words) for words in many]
    ids = tokenizer.encode_batch([text for text, _ in joined])
    found: list[list[WordLabel]] = []
    logits = label_logits(model, params, ids)
    for words, (text, starts), tokens, scores in zip(many, joined, ids, logits, strict=True):
        scores = scores[np.searchsorted(ends_of(text, tokens), starts, side="right")]
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        best = zip(words, shares.argmax(axis=1), shares.max(axis=1), strict=True)
        found.append([WordLabel(word, head.labels[i], float(p)) for word, i, p in best])
    return found


def find_answers(
    model: Neo,
    params: Params,
    tokenizer: Tokenizer,
    questions: Sequence[tuple[str, str]],
    longest: int = LONGEST_ANSWER,
) -> list[FoundAnswer]:
    """Returns the part of its context that answers each question best.

    Args:
      model: with a head `qa_outputs`.
      params: its parameters.
      tokenizer: the model's.
      questions: pairs of a question and a context.
      longest: tokens that an answer has at most.

    Raises:
      NeoError: the model finds no answers, a question or a context is empty, or both together have
        more tokens than the model's context holds.
    """
    model.config.head.check_kind("qa_outputs")
    if longest < 1:
        raise NeoError(f"longest must be at least 1, not {longest}.")
    for pair in questions:
        for name, text in zip(("question", "context"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise NeoError(f"a {name} is {brief(text)}; give a text.")
    joined = [join_question(*pair) for pair in questions]
    ids, ends_of = tokenizer.encode_batch([text for text, _ in joined]), TokenEnds(tokenizer)
    found: list[FoundAnswer] = []
    logits = label_logits(model, params, ids)
    for (text, begin), tokens, scores in zip(joined, ids, logits, strict=True):
        ends = ends_of(text, tokens)
        first = int(np.searchsorted(ends, begin, side="right"))
        start, last, probability = best_span(scores, first, longest)
        here = text[max(int(ends[start - 1]), begin) : int(ends[last])]
        at = int(ends[last]) - len(here.lstrip()) - begin
        answer = here.strip()
        found.append(FoundAnswer(answer, at, at + len(answer), probability))
    return found


def _words(text: Any) -> list[str]:
    words = text.split() if isinstance(text, str) else [*text]
    if wrong := [word for word in words if not isinstance(word, str) or not word.strip()]:
        raise NeoError(f"{brief(wrong[0])} is no word; give a text, or a list of words.")
    if not words:
        raise NeoError("a text has no words; give at least one.")
    return words
