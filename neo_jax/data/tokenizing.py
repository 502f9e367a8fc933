"""Documents to token ids in the files of a data set, in a way that can be interrupted.

A thread reads ahead while the tokenizer uses all cores. Documents keep their order, so the files
are the same, byte for byte, however many cores there are and wherever the work was interrupted.
"""

import contextlib
import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from neo_jax.data.journal import Journal, Place
from neo_jax.data.progress import progress_bar
from neo_jax.data.sources import Document, Pair, Source
from neo_jax.data.staging import JOURNAL, WORK, clear
from neo_jax.data.tfrecords import Record
from neo_jax.data.tokenizer import Tokenizer
from neo_jax.data.writer import HELD_OUT, TRAIN, Extent, SplitWriter, holds
from neo_jax.errors import NeoError

T = TypeVar("T")


def tokenize(
    sources: Sequence[Source],
    folder: Path,
    tokenizer: Tokenizer,
    end: int,
    held_out: float,
    pairs: bool,
    settings: Sequence[Any],
    progress: bool | None,
) -> dict[str, Extent]:
    """Writes the splits into sub-folders, or what is missing of them; returns their extents.

    Args:
      sources: the inputs.
      folder: of `staging`.
      tokenizer: makes ids of text.
      end: the end of text.
      held_out: the share of documents to hold out.
      pairs: whether the documents are pairs.
      settings: what decides the result beside the inputs; others than last time start over.
      progress: show what happens on stderr; None shows a bar where that is a terminal.

    Raises:
      NeoError: an input cannot be read, pairs and other documents come together, or an id is not
        in the vocabulary.
    """
    dtype = token_dtype(tokenizer)
    names = (TRAIN, HELD_OUT) if held_out else (TRAIN,)
    journal = Journal(folder / WORK / JOURNAL, settings, sources)
    was_stopped = not journal.is_empty
    found = journal.newest(
        lambda place: all(holds(folder / name, dtype, place.extents[name], pairs) for name in names)
    )
    if found is None:
        clear(folder)
    place = found or Place(0, 0, dict.fromkeys(names, Extent()))
    if was_stopped and progress is not False:
        print(_greeting(place), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(SplitWriter(folder / name, dtype, extent, pairs))
            for name, extent in place.extents.items()
        }
        read_ahead = _read_ahead(_batches(sources, place, pairs))
        batches = stack.enter_context(contextlib.closing(read_ahead))
        advance = stack.enter_context(progress_bar("tokenizing", progress))

        def save() -> None:
            for writer in writers.values():
                writer.sync()
            journal.add(place)

        try:
            for batch in batches:
                for text, ids, prompt in _encode(batch.documents, tokenizer, end):
                    split = HELD_OUT if is_held_out(text, held_out) else TRAIN
                    writers[split].write(len(text), ids, prompt)
                    advance(1, len(text) / 1e6)
                extents = {name: writer.extent for name, writer in writers.items()}
                place = Place(batch.source, batch.read, extents)
                if journal.is_due:
                    save()
        finally:
            if any(extent.documents for extent in place.extents.values()):
                save()
    return place.extents


def _greeting(place: Place) -> str:
    documents = sum(extent.documents for extent in place.extents.values())
    if documents:
        return f"goes on after {documents:,} documents"
    return "starts over: inputs, tokenizer or options are others than when it was stopped"


class _Batch(NamedTuple):
    documents: list[Document]
    source: int  # the input in which it ends
    read: int  # the documents of that input up to there


_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 1024


def _batches(sources: Sequence[Source], place: Place, pairs: bool) -> Iterator[_Batch]:
    """Yields the documents behind a place, those that are empty left out."""
    documents: list[Document] = []
    size = 0
    number, read = place.source, place.documents
    for number in range(place.source, len(sources)):
        skip = place.documents if number == place.source else 0
        rest = itertools.islice(sources[number].documents(), skip, None)
        for read, document in enumerate(rest, start=skip + 1):
            if isinstance(document, Pair) != pairs:
                raise NeoError(
                    f"{sources[number].name} brings plain text and pairs of prompt and completion "
                    "together; prepare them apart, and train on both: --data TEXT=0.9,PAIRS=0.1"
                )
            length = _length(document)
            if length:
                documents.append(document)
                size += length
            if size >= _BATCH_CHARACTERS or len(documents) == _BATCH_DOCUMENTS:
                yield _Batch(documents, number, read)
                documents, size = [], 0
    if documents:
        yield _Batch(documents, number, read)


def _length(document: Document) -> int:
    if isinstance(document, Record):
        return len(document.ids)
    return len(document.text if isinstance(document, Pair) else document)


_AHEAD = 4


def _read_ahead(items: Iterator[T]) -> Generator[T]:
    """Yields items that a thread takes from their iterator a few ahead."""
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


class _Encoded(NamedTuple):
    text: bytes
    ids: Sequence[int] | np.ndarray  # with the end of text
    prompt: int = 0  # of the ids


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, end: int) -> Iterator[_Encoded]:
    """Yields the text of every document in UTF-8, and its ids.

    A prompt is encoded apart from its completion: it has the ids that it will have alone.
    """
    texts = iter(tokenizer.encode_batch([text for each in documents for text in _texts(each)]))
    for document in documents:
        if isinstance(document, str):
            yield _Encoded(document.encode(), [*next(texts), end])
            continue
        if isinstance(document, Pair):
            prompt = next(texts)
            yield _Encoded(document.text.encode(), [*prompt, *next(texts), end], len(prompt))
            continue
        ids = document.ids
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        if wrong.size:
            raise NeoError(
                f"{document.where} holds the id {wrong[0]}, which is not in the tokenizer's "
                f"vocabulary of {tokenizer.vocab_size}; give the tokenizer that made the file."
            )
        if document.is_document and ids[-1] != end:
            ids = np.append(ids, end)
        yield _Encoded(tokenizer.decode(ids.tolist()).encode(), ids)


def _texts(document: Document) -> tuple[str, ...]:
    """Returns what of a document is to be encoded."""
    if isinstance(document, Record):
        return ()
    return tuple(document) if isinstance(document, Pair) else (document,)


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Returns in what the ids of a vocabulary are written."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")


def is_held_out(text: str | bytes, share: float) -> bool:
    """Returns whether a document is among the share that is held out; its text alone decides."""
    data = text.encode() if isinstance(text, str) else text
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
