"""Documents to token ids in the files of a data set, in a way that can be interrupted.

A thread reads ahead while the tokenizer uses all cores. Documents keep their order, so the files
are the same, byte for byte, however many cores there are and wherever the work was interrupted.
Long documents are read, tokenized and written in pieces.
"""

import contextlib
import functools
import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from neo_jax.data.atomic_folder import DATA, PARTS
from neo_jax.data.cutting import divide, exact_cuts
from neo_jax.data.progress import progress_bar
from neo_jax.data.sources import Document, Pair, Run, Source
from neo_jax.data.text_file import PART, TextFile, text_parts
from neo_jax.data.tfrecords import Record
from neo_jax.data.writer import HELD_OUT, TRAIN, Extent, Place, Writer, digests
from neo_jax.errors import NeoError
from neo_jax.text.tokenizer import Tokenizer

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
      settings: what decides the result in addition to the inputs; others than last time start over.
      progress: show what happens on stderr; None shows a bar where that is a terminal.

    Raises:
      NeoError: an input cannot be read, pairs and other documents come together, or an id is not
        in the vocabulary.
    """
    names = (TRAIN, HELD_OUT) if held_out else (TRAIN,)
    was_stopped = any((folder / PARTS).iterdir())
    marks = digests(settings, sources)
    pieces = functools.partial(
        _pieces,
        tokenizer=tokenizer,
        end=end,
        held_out=held_out,
        divided=_divider(tokenizer, progress),
    )
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(
            Writer(folder / DATA, folder / PARTS, token_dtype(tokenizer), names, pairs, marks)
        )
        if was_stopped and progress is not False:
            print(_greeting(writer.extents), file=sys.stderr)
        read_ahead = _read_ahead(_batches(sources, writer.place, pairs, pieces))
        batches = stack.enter_context(contextlib.closing(read_ahead))
        advance = stack.enter_context(progress_bar("tokenizing", progress))
        for batch in batches:
            for piece, ids in _encode(batch.pieces, tokenizer, end):
                name = HELD_OUT if piece.is_held_out else TRAIN
                writer.write(name, ids, piece.num_bytes, piece.is_prompt, piece.is_last)
                advance(int(piece.is_last), piece.num_bytes / 1e6)
            writer.reach(batch.place)
        writer.finish()
        return writer.extents


def _greeting(extents: dict[str, Extent]) -> str:
    documents = sum(extent.documents for extent in extents.values())
    if documents:
        return f"goes on after {documents:,} documents"
    return "starts over: inputs, tokenizer or options are others than when it was stopped"


class _Piece(NamedTuple):
    """A document, or the next piece of a long one."""

    content: str | np.ndarray  # a text, or ids
    num_bytes: int  # of the text in UTF-8
    is_held_out: bool
    is_prompt: bool = False
    is_last: bool = True


def _pieces(
    document: Document,
    tokenizer: Tokenizer,
    end: int,
    held_out: float,
    divided: Callable[[str | TextFile], Iterator[str]],
) -> Iterator[_Piece]:
    """Yields the pieces of a document, none of one without text.

    A prompt is encoded apart from its completion: it has the ids that it will have alone.
    """
    if isinstance(document, Record):
        if len(document.ids):
            ids = _checked(document, tokenizer, end)
            text = tokenizer.decode(ids.tolist())
            yield _Piece(ids, len(text.encode()), is_held_out(text, held_out))
        return
    is_out = is_held_out(document, held_out)
    document = document.text if isinstance(document, Run) else document
    prompt, rest = document if isinstance(document, Pair) else ("", document)
    for text in divided(prompt):
        yield _Piece(text, len(text.encode()), is_out, is_prompt=True, is_last=False)
    for text, following in itertools.pairwise(itertools.chain(divided(rest), [""])):
        yield _Piece(text, len(text.encode()), is_out, is_last=not following)


def _checked(record: Record, tokenizer: Tokenizer, end: int) -> np.ndarray:
    """Returns the ids of a record, with the end of text behind a document."""
    ids = record.ids
    wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
    if wrong.size:
        raise NeoError(
            f"{record.where} holds the id {wrong[0]}, which is not in the tokenizer's "
            f"vocabulary of {tokenizer.vocab_size}; give the tokenizer that made the file."
        )
    return np.append(ids, end) if record.is_document and ids[-1] != end else ids


def _divider(
    tokenizer: Tokenizer, progress: bool | None
) -> Callable[[str | TextFile], Iterator[str]]:
    """Returns what gives a text in pieces whose ids are its own, and reports if it cannot."""
    cuts = exact_cuts(tokenizer)
    report = functools.cache(lambda: print(_WHOLE, file=sys.stderr))  # once

    def divided(text: str | TextFile) -> Iterator[str]:
        parts = text_parts(text)
        if cuts:
            yield from divide(parts, cuts)
            return
        first = list(itertools.islice(parts, 2))
        if len(first) == 2 and progress is not False:
            report()
        if first:
            yield "".join([*first, *parts])

    return divided


_WHOLE = (
    f"documents of more than {PART:,} characters are tokenized whole, and take memory by their "
    "length: where this tokenizer's texts can be cut to the same ids is not known"
)


class _Batch(NamedTuple):
    pieces: list[_Piece]
    place: Place  # up to which all documents end in it


_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 1024


def _batches(
    sources: Sequence[Source],
    place: Place,
    pairs: bool,
    pieces: Callable[[Document], Iterator[_Piece]],
) -> Iterator[_Batch]:
    """Yields the documents behind a place, those that are empty left out."""
    batch: list[_Piece] = []
    size = documents = 0
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
            for piece in pieces(document):
                batch.append(piece)
                size += len(piece.content)
                documents += piece.is_last
                if size >= _BATCH_CHARACTERS or documents == _BATCH_DOCUMENTS:
                    yield _Batch(batch, Place(number, read if piece.is_last else read - 1))
                    batch, size, documents = [], 0, 0
    if batch:
        yield _Batch(batch, Place(number, read))


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


def _encode(
    pieces: Sequence[_Piece], tokenizer: Tokenizer, end: int
) -> Iterator[tuple[_Piece, Sequence[int] | np.ndarray]]:
    """Yields every piece and its ids, with the end of text behind the last of a text."""
    contents = [piece.content for piece in pieces]
    texts = iter(tokenizer.encode_batch([each for each in contents if isinstance(each, str)]))
    for piece in pieces:
        if isinstance(piece.content, str):
            yield piece, [*next(texts), end] if piece.is_last else next(texts)
        else:
            yield piece, piece.content


def token_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """Returns in what the ids of a vocabulary are written."""
    return np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")


def is_held_out(document: str | TextFile | Pair | Run, share: float) -> bool:
    """Returns whether a document is among the share that is held out; its text alone decides."""
    if isinstance(document, Run):
        return document.is_held_out
    text = document.text if isinstance(document, Pair) else document
    hasher = hashlib.blake2b(digest_size=8)
    for part in text_parts(text) if share else ():
        hasher.update(part.encode())
    return int.from_bytes(hasher.digest(), "little") < share * 2**64
