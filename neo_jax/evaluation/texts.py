"""How well a model predicts texts: bits a byte, perplexity a token and a word.

A document begins after the end-of-text token, where the tokenizer has one, so that all of it is
predicted; else its first token is not. Beyond the context it is read by windows (see
`neo_jax.text.score`). Words are what white space separates, counted as lm-evaluation-harness does.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from neo_jax.data.sources import find_sources, json_lines
from neo_jax.data.text_file import TextFile
from neo_jax.errors import NeoError
from neo_jax.evaluation import wikitext
from neo_jax.files.compression import unpacked_name
from neo_jax.files.paths import make_path
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.score import score_ids

SHORTEST = 64
"""Tokens of the shortest beginning of a document that is counted apart."""

_TOGETHER = 1 << 16  # bytes of text that are tokenized and scored together, at least


class Document(NamedTuple):
    """A text, and what it counts as."""

    text: str
    subset: str  # The Pile's, or the name of the file
    words: int
    num_bytes: int


def read_documents(paths: Sequence[str], is_wikitext: bool = False) -> Iterator[Document]:
    """Yields the documents of files, one in memory at a time; empty ones are left out.

    Of the paths see `find_sources`. WikiText's raw files have pages, which are detokenized, but
    counted as they were.

    Raises:
      NeoError: what cannot be read, or holds no text.
    """
    empty = True
    pages = ((path, page) for path in paths for page in read_pages(path))
    for subset, counted in pages if is_wikitext else _texts(paths):
        if counted:
            empty = False
            text = wikitext.detokenize(counted) if is_wikitext else counted
            yield Document(text, subset, count_words(counted), len(counted.encode()))
    if empty:
        raise NeoError(f"{', '.join(paths)}: no text to evaluate; every document is empty.")


def count_words(text: str) -> int:
    """Returns the number of words, as lm-evaluation-harness counts them."""
    return len(re.split(r"\s+", text))


def read_pages(path: str) -> Iterator[str]:
    """Returns the pages of one of WikiText's raw files.

    Raises:
      NeoError: a file that cannot be read, or is not UTF-8.
    """
    return wikitext.pages(TextFile(make_path(path)).text)


def _texts(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    for source in find_sources(paths):
        if unpacked_name(source.name).endswith(".jsonl"):
            for where, fields in json_lines(make_path(source.name)):
                text, meta = fields.get("text"), fields.get("meta")
                if not isinstance(text, str):
                    raise NeoError(f'{where}: no "text"; every line is {{"text": "..."}}.')
                subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
                yield str(subset or source.name), text
            continue
        for document in source.documents():
            text = document.text if isinstance(document, TextFile) else document
            if not isinstance(text, str):
                raise NeoError(f"{source.name} holds no plain text; name .txt or .jsonl files.")
            yield source.name, text


@dataclasses.dataclass
class Total:
    """What was counted over some documents."""

    documents: int = 0
    tokens: int = 0  # scored
    words: int = 0
    num_bytes: int = 0
    nats: float = 0.0  # -log p of all scored tokens
    # The same by how many tokens of the document come before one: 1 to 64, 65 to 128, 129 to 256,
    # ..., each by the last number: how many are scored, and their -log p.
    tokens_after: Counter[int] = dataclasses.field(default_factory=Counter)
    nats_after: Counter[int] = dataclasses.field(default_factory=Counter)

    @property
    def bits_per_byte(self) -> float:
        """Bits to encode a byte."""
        return self.nats / math.log(2) / max(self.num_bytes, 1)

    @property
    def token_perplexity(self) -> float:
        """The perplexity of a scored token."""
        return _exp(self.nats / max(self.tokens, 1))

    @property
    def word_perplexity(self) -> float:
        """The perplexity of a word."""
        return _exp(self.nats / max(self.words, 1))

    def add(self, other: "Total") -> None:
        """Adds what was counted elsewhere."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def measure(
    lm: LanguageModel, documents: Iterable[Document], stride: int = 0, batch_size: int = 0
) -> Iterator[tuple[str, Total]]:
    """Yields the subset of each document and what was counted over it, in order.

    Of the stride and the batch size see `score_ids`.

    Raises:
      NeoError: no tokenizer, or a stride beyond the context.
    """
    for some in _batches(documents):
        ids = [[*start_of_text(lm), *lm.encode(document.text, False)] for document in some]
        scores = score_ids(lm.model, lm.params, ids, stride, batch_size)
        for document, logprobs in zip(some, scores, strict=True):
            nats = -float(logprobs.sum(dtype="float64"))
            counted = Total(1, len(logprobs), document.words, document.num_bytes, nats)
            start, stop = 0, SHORTEST
            while start < len(logprobs):
                some_nats = -float(logprobs[start:stop].sum(dtype="float64"))
                counted.tokens_after[stop] = min(stop, len(logprobs)) - start
                counted.nats_after[stop] = some_nats  # type: ignore[assignment]  # also adds floats
                start, stop = stop, 2 * stop
            yield document.subset, counted


def start_of_text(lm: LanguageModel) -> list[int]:
    """Returns what documents begin after: the end of text, if the tokenizer has one."""
    end = lm.tokenizer.eos_id if lm.tokenizer else None
    return [] if end is None else [end]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
