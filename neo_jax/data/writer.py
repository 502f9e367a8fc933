"""A data set on disk, and how it is written: in parts, so that what was stopped goes on.

dataset.json             version, dtype, vocab_size, eos_id, pairs (whether documents are pairs of
                         prompt and completion), statistics of every split
{train,held_out}/
  tokens.bin             ids, little-endian uint16 (uint32 for large vocabularies); an end of text
                         behind every document
  offsets.npy            int64 [documents + 1]: where each document begins, and the end
  prompts.npy            of pairs, int64 [documents]: how many tokens of each are its prompt
tokenizer.json, ...      the tokenizer

Tokens are appended. When those of some documents are on the disk, the file of a part says how long
the documents are and how far the inputs are read. It is renamed when it is whole, and holds as long
as the settings and the inputs up to the one in which it ends are the same. What follows may change:
a damaged input can be replaced.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from neo_jax.data.sources import Source
from neo_jax.files.paths import write_whole

VERSION = 1
DATASET_FILE = "dataset.json"
TRAIN, HELD_OUT = "train", "held_out"
TOKENS_FILE, OFFSETS_FILE, PROMPTS_FILE = "tokens.bin", "offsets.npy", "prompts.npy"

_SECONDS, _DOCUMENTS = 10.0, 100_000  # of a part


class Extent(NamedTuple):
    """How much of a split is written, in whole documents."""

    documents: int = 0
    bytes: int = 0  # of the documents' text in UTF-8
    tokens: int = 0


class Place(NamedTuple):
    """How far the inputs are read."""

    source: int = 0  # the input that is being read
    documents: int = 0  # of it that are read


class _Part(NamedTuple):
    """What the file of a part says."""

    digest: str  # of the settings and the inputs
    place: Place
    # Of each split the bytes of its documents, the tokens of each, and those of each prompt.
    splits: dict[str, tuple[int, list[int], list[int]]]


class Writer:
    """Appends documents to the named splits of a data set, behind the parts that hold.

    A context manager, which ends the last part. Of the digests see the function `digests`.
    """

    def __init__(
        self,
        folder: Path,
        parts: Path,
        dtype: np.dtype[Any],
        names: Sequence[str],
        pairs: bool,
        digests: Sequence[str],
    ) -> None:
        self.place = Place()
        self.extents = dict.fromkeys(names, Extent())
        self._folder, self._parts, self._dtype = folder, parts, dtype
        self._pairs, self._digests = pairs, digests
        self._count = 0  # of the parts
        while (part := self._read(self._count)) and self._holds(part):
            self._add(part)
        whole = {self._path(number) for number in range(self._count)}
        for path in set(parts.iterdir()) - whole:
            path.unlink()
        if not whole:
            shutil.rmtree(folder)
        with contextlib.ExitStack() as files:
            self._files: dict[str, IO[bytes]] = {}
            for name, extent in self.extents.items():
                (folder / name).mkdir(parents=True, exist_ok=True)
                file = files.enter_context(self._tokens(name).open("ab"))
                file.truncate(extent.tokens * dtype.itemsize)
                self._files[name] = file
            self._closing = files.pop_all()
        self._document = (0, 0, 0)  # bytes, tokens and prompt of the one that is being written
        self._batch: list[tuple[str, int, int, int]] = []  # the same and the split of whole ones
        self._new: list[tuple[str, int, int, int]] = []  # of the part
        self._time = time.monotonic()  # at which the part began

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        with self._closing:
            self._end_part()

    def write(
        self, name: str, ids: Sequence[int] | np.ndarray, size: int, is_prompt: bool, is_last: bool
    ) -> None:
        """Appends ids to a document of a split, of `size` bytes of text; the last ones end it."""
        self._files[name].write(np.asarray(ids, self._dtype))
        before, tokens, prompt = self._document
        prompt += len(ids) if is_prompt else 0
        self._document = (before + size, tokens + len(ids), prompt)
        if is_last:
            self._batch.append((name, *self._document))
            self._document = (0, 0, 0)

    def reach(self, place: Place) -> None:
        """Takes note that all documents up to a place are written; a part may end there."""
        self._new += self._batch
        self._batch, self.place = [], place
        if time.monotonic() - self._time >= _SECONDS or len(self._new) >= _DOCUMENTS:
            self._end_part()

    def finish(self) -> None:
        """Writes where documents begin, and how long the prompts of pairs are."""
        self._end_part()
        for name, extent in self.extents.items():
            with contextlib.ExitStack() as files:
                folder, end = self._folder / name, 0
                offsets = files.enter_context((folder / OFFSETS_FILE).open("wb"))
                _write_numbers(offsets, [0], extent.documents + 1)
                if self._pairs:
                    prompts = files.enter_context((folder / PROMPTS_FILE).open("wb"))
                    _write_numbers(prompts, [], extent.documents)
                for part in filter(None, map(self._read, range(self._count))):
                    _, lengths, of_prompts = part.splits[name]
                    _write_numbers(offsets, np.cumsum([end, *lengths])[1:])
                    end += sum(lengths)
                    if self._pairs:
                        _write_numbers(prompts, of_prompts)

    def _end_part(self) -> None:
        if not self._new:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        splits: dict[str, tuple[int, list[int], list[int]]] = {}
        for name in self.extents:
            documents = [numbers for split, *numbers in self._new if split == name]
            sizes, lengths, prompts = zip(*documents, strict=True) if documents else ((), (), ())
            splits[name] = (sum(sizes), list(lengths), list(prompts) if self._pairs else [])
        part = _Part(self._digests[self.place.source], self.place, splits)
        write_whole(self._path(self._count), json.dumps(part))
        self._add(part)
        self._new, self._time = [], time.monotonic()

    def _add(self, part: _Part) -> None:
        self._count += 1
        self.place = part.place
        for name, (size, lengths, _) in part.splits.items():
            documents, total, tokens = self.extents[name]
            self.extents[name] = Extent(
                documents + len(lengths), total + size, tokens + sum(lengths)
            )

    def _holds(self, part: _Part) -> bool:
        """Returns whether a part is of these inputs, and its tokens are there."""
        if part.digest not in self._digests[part.place.source : part.place.source + 1]:
            return False
        sizes = {
            name: (self.extents[name].tokens + sum(lengths)) * self._dtype.itemsize
            for name, (_, lengths, _) in part.splits.items()
        }
        paths = {self._tokens(name): size for name, size in sizes.items()}
        return all(path.is_file() and path.stat().st_size >= n for path, n in paths.items())

    def _read(self, number: int) -> _Part | None:
        """Returns a part; None where there is none, or it was lost with the power."""
        try:
            digest, place, splits = json.loads(self._path(number).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return _Part(digest, Place(*place), splits)

    def _path(self, number: int) -> Path:
        return self._parts / f"{number}.json"

    def _tokens(self, name: str) -> Path:
        return self._folder / name / TOKENS_FILE


def _write_numbers(file: IO[bytes], numbers: Any, count: int | None = None) -> None:
    """Appends numbers to an .npy file of int64, or begins one that will hold `count`."""
    if count is not None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
    file.write(np.asarray(numbers, "<i8"))


def digests(settings: Any, sources: Sequence[Source]) -> list[str]:
    """Returns for every source what changes with the settings, the source and those before it."""
    hasher = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    result = []
    for source in sources:
        hasher.update(json.dumps([source.name, source.version]).encode())
        result.append(hasher.hexdigest())
    return result
