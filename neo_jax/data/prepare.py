"""Text to a data set on disk, whose files `writer` describes."""

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from neo_jax.data.atomic_folder import DATA, TRAINED, staging
from neo_jax.data.cutting import LINES, divide
from neo_jax.data.passages import LENGTH, are_few, by_passages
from neo_jax.data.progress import Advance, progress_bar
from neo_jax.data.sources import Pair, Run, Source, find_sources
from neo_jax.data.statistics import length_statistics
from neo_jax.data.text_file import text_parts
from neo_jax.data.tfrecords import Record
from neo_jax.data.tokenizer_training import train_byte_pairs, train_sentencepiece
from neo_jax.data.tokenizing import is_held_out, token_dtype, tokenize
from neo_jax.data.writer import (
    DATASET_FILE,
    HELD_OUT,
    OFFSETS_FILE,
    TRAIN,
    VERSION,
    Extent,
    digests,
)
from neo_jax.errors import NeoError
from neo_jax.files.paths import absolute, find_files, make_path
from neo_jax.text.tokenizer import BytePairTokenizer, Tokenizer, find_tokenizer, load_tokenizer

TokenizerKind = Literal["sentencepiece", "bpe"]

_TRAINERS = {"sentencepiece": train_sentencepiece, "bpe": train_byte_pairs}


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    *,
    train_tokenizer: int = 0,
    tokenizer_kind: TokenizerKind = "sentencepiece",
    new_tokens: Sequence[str] = (),
    text_field: str = "text",
    separator: str = "",
    held_out: float = 0.0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Tokenizes documents into a data set folder, which appears complete or not at all.

    Documents without text are left out. Whether a document is held out is a property of its text
    alone, so the splits stay the same when files are added or reordered, and copies of a document
    stay together. Where fewer than three would be expected in a split, and documents are long,
    passages are held out instead, see `neo_jax.data.passages`; that is reported.

    Memory holds some megabytes of pieces of documents, but for a line of JSON, a row or a record,
    which is read whole, and for tokenizers whose texts cannot be cut to the same ids
    (SentencePiece), which is reported.

    What was interrupted, even by SIGKILL, goes on where it was when the same is requested again:
    same output, tokenizer and options, and inputs that have not changed as far as they were read.
    The ids of TFRecords are taken as they are, and need the tokenizer that made them.

    Args:
      inputs: files, folders, globs and hf:// names, as `sources.find_sources` takes them.
      output: the folder to write, new or empty. Until all is there it is made in .NAME.partial next
        to it, or in ~/.cache/neo_jax for one on gs://.
      tokenizer: a tokenizer, the folder or file of one, or a model's name; see `find_tokenizer`.
      train_tokenizer: instead of `tokenizer`, the size of one to train on the documents that are
        not held out.
      tokenizer_kind: of the tokenizer to train: SentencePiece, or byte-level BPE as GPT-2's.
      new_tokens: special tokens to add to the tokenizer; not for SentencePiece.
      text_field: the name of the text in a JSON line or a row, and of the ids in a TFRecord.
      separator: of documents in .txt files, in addition to `<|endoftext|>`.
      held_out: the share of documents to hold out, at least 0 and less than 1.
      progress: show a progress bar on stderr; None shows it where stderr is a terminal.

    Returns:
      The content of dataset.json: "version", "dtype", "vocab_size", "eos_id", "pairs" (whether
      documents are pairs), and "splits", which gives for "train" and, if documents are held out,
      "held_out": "documents", "bytes" (of the text in UTF-8), "tokens" (ends of text included),
      "tokens_per_byte", and "lengths", see `statistics.length_statistics`.

    Raises:
      NeoError: no tokenizer or two, one that takes no new tokens, a tokenizer without an end of
        text, an input that cannot be read or holds no text, pairs together with plain text, a split
        without documents, or an output that is there already or being written.
    """
    if (tokenizer is None) == (train_tokenizer == 0):
        raise NeoError("prepare needs either a tokenizer or the size of one to train, not both.")
    if train_tokenizer < 0:
        raise NeoError(f"a tokenizer of {train_tokenizer} pieces cannot be trained; try 4096.")
    if not 0 <= held_out < 1:
        raise NeoError(f"held_out is a share of the documents from 0 to below 1, not {held_out}.")
    with staging(absolute(make_path(output))) as folder:
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = find_tokenizer(tokenizer)
        sources = find_sources(inputs, text_field, separator)
        few = are_few(sources, held_out)
        settings = [VERSION, held_out, text_field, separator, few]
        if few:
            sources = by_passages(sources, held_out)
            if progress is not False:
                print(_BY_PASSAGES, file=sys.stderr)
        copy = folder / "tokenizer"
        if tokenizer is None:
            mark = digests([*settings, train_tokenizer, tokenizer_kind], sources)[-1]
            trained = folder / TRAINED
            if not trained.is_file() or trained.read_text() != mark:
                with progress_bar("reading", progress) as advance:
                    texts = _not_held_out(sources, held_out, advance)
                    _TRAINERS[tokenizer_kind](texts, train_tokenizer, _emptied(copy))
                trained.write_text(mark)
            tokenizer = load_tokenizer(copy)
        else:
            tokenizer.save(_emptied(copy))
        if new_tokens:
            tokenizer = _with_new_tokens(copy, new_tokens)
        if tokenizer.eos_id is None:
            raise NeoError("the tokenizer has no end-of-text token; name one as its eos_token.")
        settings += [tokenizer.vocab_size, tokenizer.eos_id, _digest(copy), *new_tokens]
        pairs, end = _are_pairs(sources), tokenizer.eos_id
        extents = tokenize(sources, folder, tokenizer, end, held_out, pairs, settings, progress)
        _check_splits(folder, extents, held_out)
        return _finish(folder / DATA, tokenizer, extents, pairs)


_BY_PASSAGES = (
    f"documents are few and long: passages of {LENGTH:,} characters or more are held out, evenly "
    "spread, and what lies between two of them is a document"
)


def _are_pairs(sources: Sequence[Source]) -> bool:
    """Returns what the first document is; the others must be of its kind."""
    documents = (document for source in sources for document in source.documents())
    with contextlib.closing(documents):
        return isinstance(next(documents, None), Pair)


def _with_new_tokens(folder: Path, new_tokens: Sequence[str]) -> Tokenizer:
    tokenizer = load_tokenizer(folder)  # the one that was given stays as it is
    if not isinstance(tokenizer, BytePairTokenizer):
        raise NeoError(
            "a SentencePiece tokenizer takes no new tokens; leave them out, or use a "
            "tokenizer.json."
        )
    tokenizer.add_tokens(new_tokens)
    return tokenizer


def _not_held_out(sources: Sequence[Source], held_out: float, advance: Advance) -> Iterator[str]:
    for source in sources:
        for document in source.documents():
            if isinstance(document, Record):
                raise NeoError(
                    f"{document.where} holds token ids; give the tokenizer that made them instead "
                    "of training one."
                )
            text = document.text if isinstance(document, Pair | Run) else document
            advance(1, 0.0)
            if not is_held_out(document, held_out):
                for lines in divide(text_parts(text), LINES):
                    advance(0, len(lines) / 1e6)
                    yield lines


def _finish(
    folder: Path, tokenizer: Tokenizer, extents: dict[str, Extent], pairs: bool
) -> dict[str, Any]:
    """Writes all but the splits; returns the content of dataset.json."""
    splits = {
        name: {
            **extent._asdict(),
            "tokens_per_byte": round(extent.tokens / max(extent.bytes, 1), 6),
            "lengths": length_statistics(folder / name / OFFSETS_FILE),
        }
        for name, extent in extents.items()
    }
    fields = {
        "version": VERSION,
        "dtype": token_dtype(tokenizer).name,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pairs": pairs,
        "splits": splits,
    }
    tokenizer.save(folder)
    text = json.dumps(fields, indent=2) + "\n"
    (folder / DATASET_FILE).write_text(text, encoding="utf-8")
    return fields


def _check_splits(folder: Path, extents: dict[str, Extent], held_out: float) -> None:
    if all(extent.documents for extent in extents.values()):
        return
    shutil.rmtree(folder)  # nothing to go on from: other options are needed
    total = sum(extent.documents for extent in extents.values())
    if not total:
        raise NeoError("the input holds no text; are the files empty?")
    name, fix = (TRAIN, "a smaller") if not extents[TRAIN].documents else (HELD_OUT, "a larger")
    raise NeoError(
        f"with held_out {held_out} none of the {total} documents is left for the split '{name}'; "
        f"choose {fix} share, or give more documents."
    )


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _digest(folder: Path) -> str:
    """Returns what changes with any file in a folder."""
    hasher = hashlib.blake2b(digest_size=16)
    for path in find_files(folder):
        data = path.read_bytes()
        hasher.update(f"{path.name} {len(data)} ".encode() + data)
    return hasher.hexdigest()
