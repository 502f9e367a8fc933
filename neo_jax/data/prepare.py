"""Text to a data set on disk: flat token ids, the offsets of the documents, statistics.

output/dataset.json             version, dtype, vocab_size, eos_id, statistics of every split
output/{train,held_out}/
  tokens.bin                    ids, little-endian uint16 (uint32 for large vocabularies); an
                                end of text behind every document
  offsets.npy                   int64 [documents + 1]: where each document begins, and the end
output/tokenizer.json, ...      the tokenizer
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neo_jax.data.sources import documents
from neo_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from neo_jax.data.tokenizer_training import train_sentencepiece
from neo_jax.errors import NeoError, reason
from neo_jax.paths import absolute, check_writable, find_files, is_remote, make_path

VERSION = 1
DATASET_FILE = "dataset.json"
TRAIN, HELD_OUT = "train", "held_out"


def prepare(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    *,
    train_tokenizer: int = 0,
    held_out: float = 0.0,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Tokenizes documents into a data set folder, which appears complete or not at all.

    Documents without text are left out. Whether a document is held out is a property of its text
    alone, so the splits stay the same when files are added or reordered, and copies of a document
    stay together. Memory holds a few documents, not the data set.

    Args:
      inputs: files, folders and globs, as `sources.documents` takes them.
      output: the folder to write; a data set that is there already is replaced. One on gs:// is
        made in a temporary folder first.
      tokenizer: a tokenizer, or the folder or file of one.
      train_tokenizer: instead of `tokenizer`, the number of pieces of a SentencePiece tokenizer
        to train on the documents that are not held out.
      held_out: the share of documents to hold out, at least 0 and less than 1.
      progress: show a progress bar on stderr; None shows it where stderr is a terminal.

    Returns:
      The content of dataset.json: "version", "dtype", "vocab_size", "eos_id", and "splits", which
      gives for "train" and, if documents are held out, "held_out": "documents", "bytes" (of the
      text in UTF-8), "tokens" (ends of text included) and "tokens_per_byte".

    Raises:
      NeoError: no tokenizer or two, a tokenizer without an end of text, an input that cannot be
        read or holds no text, a split without documents, or an output that is something else.
    """
    if (tokenizer is None) == (train_tokenizer == 0):
        raise NeoError("prepare needs either a tokenizer or the size of one to train, not both.")
    if train_tokenizer < 0:
        raise NeoError(f"a tokenizer of {train_tokenizer} pieces cannot be trained; try 4096.")
    if not 0 <= held_out < 1:
        raise NeoError(f"held_out is a share of the documents from 0 to below 1, not {held_out}.")
    show = sys.stderr.isatty() if progress is None else progress
    target = absolute(make_path(output))
    _check_replaceable(target)
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = load_tokenizer(tokenizer)

    with _staging(target) as staging:
        if tokenizer is None:
            with _bar("reading", show) as texts:
                training = (
                    text for text in texts(documents(inputs)) if not is_held_out(text, held_out)
                )
                tokenizer = train_sentencepiece(training, train_tokenizer, staging)
        if tokenizer.eos_id is None:
            raise NeoError("the tokenizer has no end-of-text token; name one as its eos_token.")
        fields = {
            "version": VERSION,
            "dtype": _dtype(tokenizer).name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "splits": _write_splits(inputs, staging, tokenizer, held_out, show),
        }
        tokenizer.save(staging)
        text = json.dumps(fields, indent=2) + "\n"
        (staging / DATASET_FILE).write_text(text, encoding="utf-8")
    return fields


def _write_splits(
    inputs: Sequence[str | os.PathLike[str]],
    folder: Path,
    tokenizer: Tokenizer,
    held_out: float,
    show: bool,
) -> dict[str, dict[str, Any]]:
    """Writes the splits into sub-folders; returns the statistics of each."""
    names = (TRAIN, HELD_OUT) if held_out else (TRAIN,)
    with contextlib.ExitStack() as stack:
        splits = {
            name: stack.enter_context(_SplitWriter(folder / name, tokenizer)) for name in names
        }
        texts = stack.enter_context(_bar("tokenizing", show))
        for batch in _batches(text for text in texts(documents(inputs)) if text):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                split = HELD_OUT if is_held_out(text, held_out) else TRAIN
                splits[split].write(len(text.encode()), ids)
    statistics = {name: split.statistics() for name, split in splits.items()}
    _check_splits(statistics, held_out)
    return statistics


class _SplitWriter:
    """Appends documents to a split's files."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        folder.mkdir()
        self._eos = [tokenizer.eos_id]
        self._dtype = _dtype(tokenizer)
        self._tokens = (folder / "tokens.bin").open("wb")
        self._offsets = (folder / "offsets.npy").open("wb")
        self._documents = self._bytes = self._end = 0
        self._write_header()
        self._write_offset()

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        # numpy pads the header so that the final shape fits in the place of the first.
        self._offsets.seek(0)
        self._write_header()
        self._offsets.close()
        self._tokens.close()

    def write(self, num_bytes: int, ids: Sequence[int]) -> None:
        """Appends a document of `num_bytes` bytes of text, and the end of text."""
        self._tokens.write(np.asarray([*ids, *self._eos], self._dtype).tobytes())
        self._end += len(ids) + 1
        self._documents += 1
        self._bytes += num_bytes
        self._write_offset()

    def statistics(self) -> dict[str, Any]:
        """Returns what dataset.json says about this split."""
        return {
            "documents": self._documents,
            "bytes": self._bytes,
            "tokens": self._end,
            "tokens_per_byte": round(self._end / max(self._bytes, 1), 6),
        }

    def _write_header(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self._documents + 1,)}
        np.lib.format.write_array_header_1_0(self._offsets, header)

    def _write_offset(self) -> None:
        self._offsets.write(self._end.to_bytes(8, "little"))


_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 1024


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    return np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")


def is_held_out(text: str, share: float) -> bool:
    """Returns whether a document is among the share that is held out; its text alone decides."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _check_splits(splits: dict[str, dict[str, Any]], held_out: float) -> None:
    total = sum(split["documents"] for split in splits.values())
    if not total:
        raise NeoError("the input holds no text; are the files empty?")
    for name, mend in ((TRAIN, "a smaller"), (HELD_OUT, "a larger")):
        if name in splits and not splits[name]["documents"]:
            raise NeoError(
                f"with held_out {held_out} none of the {total} documents is left for the split "
                f"'{name}'; choose {mend} share, or give more documents."
            )


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    mend = "choose another output, or remove it first."
    if not target.is_dir():
        raise NeoError(f"{target} is a file; {mend}")
    inside = {path.name for path in target.iterdir()}
    if inside and DATASET_FILE not in inside:
        raise NeoError(f"{target} is a folder that holds no data set; {mend}")
    other = sorted(inside - {DATASET_FILE, TRAIN, HELD_OUT, *TOKENIZER_FILES})
    if other:
        raise NeoError(f"{target} holds '{other[0]}' beside a data set; {mend}")


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Gives a local folder that takes the place of `target` at the end, or vanishes on an error."""
    if is_remote(target):
        check_writable(target)
        with tempfile.TemporaryDirectory(prefix="neo_jax-") as name:
            yield Path(name)
            _upload(Path(name), target)
        return
    staging = target.with_name(f".{target.name}.{os.getpid()}.new")
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise NeoError(f"cannot write in {target.parent}: {error.strerror}.") from error
    try:
        yield staging
        if target.exists():
            target.rename(replaced)
        staging.rename(target)
    except OSError as error:
        raise NeoError(f"cannot write {target}: {reason(error)}.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        elif replaced.exists():
            replaced.rename(target)


def _upload(folder: Path, target: Path) -> None:
    """Replaces a data set in the cloud; without its dataset.json it is none, so that goes last."""
    old = {path.relative_to(target).as_posix() for path in find_files(target)}
    new = {path.relative_to(folder).as_posix() for path in find_files(folder)}
    (target / DATASET_FILE).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == DATASET_FILE):
        with (folder / name).open("rb") as source, (target / name).open("wb") as file:
            shutil.copyfileobj(source, file, _UPLOAD_BYTES)
    for name in old - new - {DATASET_FILE}:
        (target / name).unlink()


_UPLOAD_BYTES = 8 << 20


@contextlib.contextmanager
def _bar(title: str, show: bool) -> Iterator[Any]:
    """Gives a function that passes texts through and counts them on a progress bar."""
    if not show:
        yield lambda texts: texts
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.fields[documents]:,} documents"),
        TextColumn("{task.fields[megabytes]:,.1f} MB, {task.fields[rate]:.1f} MB/s"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None, documents=0, megabytes=0.0, rate=0.0)

        def count(texts: Iterable[str]) -> Iterator[str]:
            megabytes = 0.0
            for number, text in enumerate(texts, start=1):
                megabytes += len(text) / 1e6
                rate = megabytes / max(bar.tasks[task].elapsed or 0.0, 1e-3)
                bar.update(task, documents=number, megabytes=megabytes, rate=rate)
                yield text

        yield count
