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

WINDOW = 384
"""Tokens of a question and a part of its context that are read together, as in these examples."""

OVERLAP = 128
"""Tokens that two parts of a context have in common, `doc_stride` in these examples."""


class WordLabel(NamedTuple):
    """What a classifier of words says of one."""

    word: str
    label: str  # the likeliest
    probability: float


class FoundAnswer(NamedTuple):
    """The part of a context that answers a question best."""

    text: str  # "" where there is none
    start: int  # the character of the context at which it begins
    end: int  # and that behind it
    # That it begins there times that it ends there, each over what is read of the context together
    # and no answer.
    probability: float


class Span(NamedTuple):
    """The tokens of one of several windows that are an answer."""

    window: int
    tokens: range  # of the window; none are no answer
    probability: float


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


def windows(length: int, first: int, most: int) -> list[range]:
    """Returns the parts of a context that are read one at a time; [] where none has room.

    Two that follow each other have `OVERLAP` tokens in common, or half of each where that is less.

    Args:
      length: tokens of a question and its context.
      first: the token at which the context begins.
      most: tokens of the question and a part of its context together.
    """
    room = most - first
    if room < 1:
        return []
    step = room - min(OVERLAP, room // 2)
    more = -(-max(length - most, 0) // step)
    starts = range(first, first + (1 + more) * step, step)
    return [range(start, min(start + room, length)) for start in starts]


def best_span(
    logits: Sequence[np.ndarray], first: int, longest: int, allow_none: bool = False
) -> Span:
    """Returns the likeliest answer to a question.

    The first token of all stands for no answer, as in transformers' pipeline: its probability is
    that of this token as start and end, in the window where it is the least.

    Args:
      logits: of each window [T, 2], of start and end: the question, and a part of its context.
      first: the token at which this part begins, at least 1.
      longest: tokens that an answer has at most.
      allow_none: return no tokens where no answer is likelier than any.
    """
    found, none = [], 1.0
    for window, each in enumerate(logits):
        scores = np.concatenate([each[:1], each[first:]]).astype(np.float64)
        scores -= scores.max(axis=0)
        scores -= np.log(np.exp(scores).sum(axis=0))
        none = min(none, float(np.exp(scores[0].sum())))
        ends = np.pad(scores[1:, 1], (0, longest - 1), constant_values=-np.inf)
        pairs = scores[1:, :1] + np.lib.stride_tricks.sliding_window_view(ends, longest)
        start, more = divmod(int(np.argmax(pairs)), longest)
        tokens = range(first + start, first + start + more + 1)
        found.append(Span(window, tokens, float(np.exp(pairs[start, more]))))
    best = max(found, key=lambda span: span.probability)
    return Span(0, range(0), none) if allow_none and none > best.probability else best


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
    *,
    length: int = 0,
    allow_none: bool = False,
) -> list[FoundAnswer]:
    """Returns the part of its context that answers each question best.

    Args:
      model: with a head `qa_outputs`.
      params: its parameters.
      tokenizer: the model's.
      questions: pairs of a question and a context.
      length: tokens of a question and a part of its context that are read together, as in
        training; 0 is 384. Longer contexts are read in windows that overlap, see `windows`.
      allow_none: whether no answer may be the likeliest, of a model that has learned so from
        questions without one; then `text` is empty.

    Raises:
      NeoError: the model finds no answers, a question or a context is empty, or a question leaves
        no room for its context.
    """
    model.config.head.check_kind("qa_outputs")
    for pair in questions:
        for name, text in zip(("question", "context"), pair, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise NeoError(f"a {name} is {brief(text)}; give a text.")
    joined = [join_question(*pair) for pair in questions]
    ids, ends_of = tokenizer.encode_batch([text for text, _ in joined]), TokenEnds(tokenizer)
    ends = [ends_of(text, tokens) for (text, _), tokens in zip(joined, ids, strict=True)]
    most, read = min(length or WINDOW, model.config.max_length), []
    for (text, begin), tokens, places in zip(joined, ids, ends, strict=True):
        first = int(np.searchsorted(places, begin, side="right"))
        parts = windows(len(tokens), first, most)
        if not parts:
            raise NeoError(
                f"the question {brief(text[:begin])} has {first} tokens, which leaves no room for "
                f"its context among the {most} that are read together; shorten it."
            )
        read.append((first, parts))
    rows = [
        [*tokens[:first], *tokens[part.start : part.stop]]
        for tokens, (first, parts) in zip(ids, read, strict=True)
        for part in parts
    ]
    logits, found = iter(label_logits(model, params, rows)), []
    for (text, begin), places, (first, parts) in zip(joined, ends, read, strict=True):
        span = best_span([next(logits) for _ in parts], first, LONGEST_ANSWER, allow_none)
        if not span.tokens:
            found.append(FoundAnswer("", 0, 0, span.probability))
            continue
        before = parts[span.window].start - first  # tokens that the window leaves out
        start, last = (before + token for token in (span.tokens[0], span.tokens[-1]))
        here = text[max(int(places[start - 1]), begin) : int(places[last])]
        at = int(places[last]) - len(here.lstrip()) - begin
        answer = here.strip()
        found.append(FoundAnswer(answer, at, at + len(answer), span.probability))
    return found


def _words(text: Any) -> list[str]:
    words = text.split() if isinstance(text, str) else [*text]
    if wrong := [word for word in words if not isinstance(word, str) or not word.strip()]:
        raise NeoError(f"{brief(wrong[0])} is no word; give a text, or a list of words.")
    if not words:
        raise NeoError("a text has no words; give at least one.")
    return words
