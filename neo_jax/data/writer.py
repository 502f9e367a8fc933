"""A data set on disk: flat token ids, where each document begins, statistics.

dataset.json             version, dtype, vocab_size, eos_id, statistics of every split
{train,held_out}/
  tokens.bin             ids, little-endian uint16 (uint32 for large vocabularies); an end of text
                         behind every document
  offsets.npy            int64 [documents + 1]: where each document begins, and the end
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
TOKENS_FILE, OFFSETS_FILE = "tokens.bin", "offsets.npy"


class Extent(NamedTuple):
    """How much of a split is written."""

    documents: int = 0
    bytes: int = 0  # of the documents' text in UTF-8
    tokens: int = 0


class SplitWriter:
    """Appends documents to the files of a split; a context manager.

    Args:
      folder: of the split.
      dtype: of the tokens.
      extent: goes on from there, and cuts off what was written beyond it.
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], extent: Extent) -> None:
        folder.mkdir(exist_ok=True)
        self.extent = extent
        self._dtype = dtype
        with contextlib.ExitStack() as files:
            self._tokens, self._offsets = (
                files.enter_context(_open(folder / name)) for name in (TOKENS_FILE, OFFSETS_FILE)
            )
            self._tokens.truncate(extent.tokens * dtype.itemsize)
            self._tokens.seek(0, os.SEEK_END)
            self._write_header()
            # Of as many offsets as documents the last is missing: the end, written again below.
            self._offsets.truncate(self._offsets.tell() + 8 * extent.documents)
            self._offsets.seek(0, os.SEEK_END)
            self._write_offset()
            self._files = files.pop_all()

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with self._files:
            self._offsets.seek(0)
            self._write_header()

    def write(self, num_bytes: int, ids: Sequence[int] | np.ndarray) -> None:
        """Appends a document of `num_bytes` bytes of text."""
        self._tokens.write(np.asarray(ids, self._dtype))
        documents, size, tokens = self.extent
        self.extent = Extent(documents + 1, size + num_bytes, tokens + len(ids))
        self._write_offset()

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        for file in (self._tokens, self._offsets):
            file.flush()
            os.fsync(file.fileno())

    def _write_header(self) -> None:
        self._offsets.write(_header(self.extent))

    def _write_offset(self) -> None:
        self._offsets.write(self.extent.tokens.to_bytes(8, "little"))


def holds(folder: Path, dtype: np.dtype[Any], extent: Extent) -> bool:
    """Returns whether the files of a split are at least so long."""
    sizes = {
        folder / TOKENS_FILE: extent.tokens * dtype.itemsize,
        folder / OFFSETS_FILE: len(_header(extent)) + 8 * (extent.documents + 1),
    }
    return all(path.is_file() and path.stat().st_size >= size for path, size in sizes.items())


def _header(extent: Extent) -> bytes:
    """Returns what offsets.npy begins with; numpy makes it as long for any number of documents."""
    file = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": (extent.documents + 1,)}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def _open(path: Path) -> Any:
    path.touch()
    return path.open("r+b")
