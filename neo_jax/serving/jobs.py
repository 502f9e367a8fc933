"""What clients of the engine submit, and what they get back."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from neo_jax.decode.options import SamplingOptions
from neo_jax.decode.pooling import Pooling
from neo_jax.decode.requests import Event, PromptRead
from neo_jax.text.generate import StopText
from neo_jax.text.tokenizer import Tokenizer
from neo_jax.text.word_filter import WordFilter

CHUNK = 256
"""Tokens of prompts that are read between two steps of the texts that are being written."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A prompt, and what is wanted of it."""

    ids: Sequence[int]
    max_new_tokens: int = 0  # 0 writes nothing, and takes no options
    options: Sequence[SamplingOptions] = ()  # one for each text that continues the prompt
    stop: tuple[str, ...] = ()  # texts end before these
    stop_token_ids: tuple[int, ...] = ()  # and before these
    num_alternatives: int = 0  # likeliest tokens that come with each new one
    prompt_alternatives: int | None = None  # and with each of the prompt; None: no log p of these
    pool: Pooling = ""  # how the prompt's hidden states become one vector, if that is wanted


class Token(NamedTuple):
    """A token of a text, and how likely the model found it."""

    id: int
    logprob: float | None  # in nats, before temperature and truncation; None of a prompt's first
    alternatives: Sequence[tuple[int, float]]  # the likeliest ids and their log p, likeliest first


class PromptFound(NamedTuple):
    """What was wanted of a prompt; comes before any text, where anything was."""

    tokens: list[Token]  # empty unless their log p were wanted
    pooled: np.ndarray | None  # float32 [D]


class Delta(NamedTuple):
    """What is new of a text. The last one has the reason why it ended."""

    sample: int  # the index of its options
    text: str  # whole characters, never a part of what it stops before
    tokens: list[Token]  # the new ones, those that the text does not show included
    # "stop", "length", "content_filter" or "abort"; None while it goes on
    finish_reason: str | None


class Busy(Exception):  # noqa: N818
    """The queue is full, or the server is ending; args are the message."""


class Writer:
    """The text of a sample as its ids arrive."""

    def __init__(
        self, tokenizer: Tokenizer | None, job: Job, words: WordFilter | None = None
    ) -> None:
        """Begins after the prompt of a job; the text ends before words."""
        self._text = StopText(tokenizer, job.ids, job.stop, words) if tokenizer else None
        self._stop_ids = frozenset(job.stop_token_ids)
        self._num_ids = 0
        self._words, self._tokenizer = words, tokenizer
        self._held: list[Token] = []  # whose text may be a part of a word
        self._num_told = 0

    @property
    def is_filtered(self) -> bool:
        """Whether the text ends before a word of the filter."""
        return self._text is not None and self._text.is_filtered

    def check(self, ids: list[int]) -> int | None:
        """Takes new ids; returns how many of all to keep, where the text stops."""
        for token in ids:
            if token in self._stop_ids:
                return self._num_ids
            self._num_ids += 1
            kept = self._text.push([token]) if self._text else None
            if kept is not None:
                return kept
        return None

    def new(self, is_finished: bool) -> str:
        """Returns the text that was not returned before, and will stay."""
        return self._text.new(is_finished) if self._text else ""

    def tokens(self, new: list[Token], is_finished: bool) -> list[Token]:
        """Returns the tokens that clients may see by now, of new ones and those held before.

        With a filter these are the ones whose text will stay, without words as alternatives.
        """
        if self._words is None or self._text is None:
            return new
        self._held += new
        count = self._text.settled_ids() - self._num_told
        if is_finished and not self.is_filtered:
            count = len(self._held)
        found, self._held = self._held[:count], self._held[count:]
        self._num_told += len(found)
        return [allowed_token(self._words, self._tokenizer, token) for token in found]


def allowed_token(words: WordFilter, tokenizer: Tokenizer | None, token: Token) -> Token:
    """Returns a token without alternatives that are words of a filter."""
    if tokenizer is None or not token.alternatives:
        return token
    kept = [(i, p) for i, p in token.alternatives if not words.holds_token(tokenizer, i)]
    return token._replace(alternatives=kept)


def new_tokens(event: Event) -> list[Token]:
    """Returns the new tokens of a text."""
    none: list[list[tuple[int, float]]] = [[] for _ in event.ids]
    found = zip(event.ids, event.logprobs, event.alternatives or none, strict=True)
    return [Token(*each) for each in found]


def prompt_tokens(job: Job, event: PromptRead) -> list[Token]:
    """Returns the tokens of a prompt, if their log p were wanted."""
    num = job.prompt_alternatives
    if num is None or event.logprobs is None or event.ids is None or event.likeliest is None:
        return []
    found = [Token(job.ids[0], None, [])]
    for i, token in enumerate(job.ids[1:]):
        pairs = zip(event.ids[i, :num].tolist(), event.likeliest[i, :num].tolist(), strict=True)
        found.append(Token(token, float(event.logprobs[i]), [*pairs]))
    return found
