"""A data set on disk: flat token ids, where each document begins, statistics.

dataset.json             version, dtype, vocab_size, eos_id, pairs (whether documents are pairs of
                         prompt and completion), statistics of every split
{train,held_out}/
  tokens.bin             ids, little-endian uint16 (uint32 for large vocabularies); an end of text
                         behind every document
  offsets.npy            int64 [documents + 1]: where each document begins, and the end
  prompts.npy            of pairs, int64 [documents]: how many tokens of each are its prompt
tokenizer.json, ...      the tokenizer
"""

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
DATASET_FILE = "dataset.json"
TRAIN, HELD_OUT = "train", "held_out"
TOKENS_FILE, OFFSETS_FILE, PROMPTS_FILE = "tokens.bin", "offsets.npy", "prompts.npy"


class Extent(NamedTuple):
    """How much of a split is written, in whole documents."""

    documents: int = 0
    bytes: int = 0  # of the documents' text in UTF-8
    tokens: int = 0


class SplitWriter:
    """Appends documents to the files of a split; a context manager.

    Args:
      folder: of the split.
      dtype: of the tokens.
      extent: goes on from there, and cuts off what was written beyond it.
      pairs: whether documents are pairs.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], extent: Extent, pairs: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.extent = extent
        self._document = (0, 0, 0)  # bytes, tokens and prompt of the one that is being written
        self._dtype = dtype
        with contextlib.ExitStack() as files:
            self._tokens = files.enter_context(_open(folder / TOKENS_FILE))
            self._tokens.truncate(extent.tokens * dtype.itemsize)
            self._tokens.seek(0, os.SEEK_END)
            # Of as many offsets as documents the last is missing: the end, written again below.
            self._numbers = [
                files.enter_context(_Numbers(folder / name, extent.documents))
                for name in ((OFFSETS_FILE, PROMPTS_FILE) if pairs else (OFFSETS_FILE,))
            ]
            self._numbers[0].append(extent.tokens)
            self._files = files.pop_all()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def write(
        self,
        ids: Sequence[int] | np.ndarray,
        num_bytes: int,
        is_prompt: bool = False,
        is_last: bool = True,
    ) -> None:
        """Appends ids to a document, of `num_bytes` bytes of text; the last ones end it."""
        self._tokens.write(np.asarray(ids, self._dtype))
        size, tokens, prompt = self._document
        size, tokens = size + num_bytes, tokens + len(ids)
        prompt += len(ids) if is_prompt else 0
        self._document = (size, tokens, prompt)
        if not is_last:
            return
        self._document = (0, 0, 0)
        documents, total, before = self.extent
        self.extent = Extent(documents + 1, total + size, before + tokens)
        for numbers, number in zip(self._numbers, (self.extent.tokens, prompt), strict=False):
            numbers.append(number)

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        for file in (self._tokens, *(numbers.file for numbers in self._numbers)):
            file.flush()
            os.fsync(file.fileno())


class _Numbers:
    """An .npy file of int64 that grows; a context manager, which writes at the end how many."""

    def __init__(self, path: Path, count: int) -> None:
        """Opens a file, to go on behind its first `count` numbers."""
        self.file = _open(path)
        self._count = count
        self.file.write(_header(count))
        self.file.truncate(self.file.tell() + 8 * count)
        self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> "_Numbers":
        return self

    def __exit__(self, *_: object) -> None:
        with self.file:
            self.file.seek(0)
            self.file.write(_header(self._count))

    def append(self, number: int) -> None:
        self.file.write(number.to_bytes(8, "little"))
        self._count += 1


def holds(folder: Path, dtype: np.dtype[Any], extent: Extent, pairs: bool) -> bool:
    """Returns whether the files of a split are at least so long."""
    sizes = {
        folder / TOKENS_FILE: extent.tokens * dtype.itemsize,
        folder / OFFSETS_FILE: len(_header(0)) + 8 * (extent.documents + 1),
    }
    if pairs:
        sizes[folder / PROMPTS_FILE] = len(_header(0)) + 8 * extent.documents
    return all(path.is_file() and path.stat().st_size >= size for path, size in sizes.items())


def _header(count: int) -> bytes:
    """Returns what an .npy file begins with; numpy makes it as long for any number of items."""
    file = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _open(path: Path) -> Any:
    path.touch()
    return path.open("r+b")
