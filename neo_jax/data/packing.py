"""The data set that `prepare` wrote, as sequences of one length."""

import dataclasses
import os
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from neo_jax.config import read_json
from neo_jax.data.writer import DATASET_FILE, VERSION
from neo_jax.errors import NeoError, reason, suggest
from neo_jax.paths import file_size, is_remote, make_path, read_range


@dataclasses.dataclass(frozen=True)
class RemoteTokens:
    """The tokens of a file in the cloud: what a memory map is on disk, of which slices are read."""

    path: Path
    dtype: np.dtype
    num_tokens: int

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads the tokens of a slice without a step."""
        start, stop, _ = part.indices(self.num_tokens)
        if stop <= start:
            return np.empty(0, self.dtype)
        size = self.dtype.itemsize
        return np.frombuffer(read_range(self.path, start * size, stop * size), self.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDataset:
    """A split of a data set, cut into sequences without regard to where documents end.

    Sequence i holds the tokens from i * length to i * length + length inclusive: its last token is
    the first of the next. With inputs [:-1] and targets [1:] every token but the very first is a
    target exactly once, save the fewer than `length` at the end that fill no sequence.
    """

    tokens: np.ndarray | RemoteTokens  # [num_tokens], memory-mapped; uint16 or uint32
    length: int  # targets of a sequence
    num_bytes: int  # of the documents' text in UTF-8
    num_documents: int
    vocab_size: int
    tokenizer_folder: Path  # holds the tokenizer's files

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], split: str = "train", length: int = 1024
    ) -> "TokenDataset":
        """Opens a split, "train" or "held_out".

        Raises:
          NeoError: no data set, no such split, files that do not match dataset.json, or fewer
            tokens than one sequence takes.
        """
        folder = make_path(folder)
        if not (folder / DATASET_FILE).is_file():
            raise NeoError(
                f"{folder} holds no data set; make one: neo-jax prepare FILE... --output {folder}"
            )
        fields = read_json(folder / DATASET_FILE)
        if fields.get("version") != VERSION:
            raise NeoError(
                f"{folder / DATASET_FILE} has version {fields.get('version')!r}, not {VERSION}; "
                "run neo-jax prepare again."
            )
        splits = _field(folder, fields, "splits", dict)
        if split not in splits:
            raise NeoError(f"{folder} has no split '{split}'.{suggest(split, splits)}")
        num_tokens, num_bytes, num_documents = (
            _field(folder, splits[split], name, int) for name in ("tokens", "bytes", "documents")
        )
        if length < 1:
            raise NeoError(f"the length of a sequence must be at least 1, not {length}.")
        if num_tokens < length + 1:
            raise NeoError(
                f"split '{split}' of {folder} has {num_tokens} tokens, too few for a sequence of "
                f"{length}; choose a length below {num_tokens}, or prepare more text."
            )
        return cls(
            tokens=_map(folder, split, _field(folder, fields, "dtype", str), num_tokens),
            length=length,
            num_bytes=num_bytes,
            num_documents=num_documents,
            vocab_size=_field(folder, fields, "vocab_size", int),
            tokenizer_folder=folder,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, ends of text included."""
        return len(self.tokens)

    def __len__(self) -> int:
        """Returns the number of whole sequences."""
        return (self.num_tokens - 1) // self.length

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        """Returns sequence `index`: "tokens", int32 [length + 1]."""
        i = range(len(self))[index]  # negative indices, and IndexError
        start = i * self.length
        return {"tokens": self.tokens[start : start + self.length + 1].astype(np.int32)}


def split_names(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the splits that a data set has."""
    folder = make_path(folder)
    return list(_field(folder, read_json(folder / DATASET_FILE), "splits", dict))


def _field(folder: Path, fields: Any, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise NeoError(f"{folder / DATASET_FILE}: '{name}' is {value!r}; is the file whole?")
    return value


def _map(folder: Path, split: str, dtype: str, num_tokens: int) -> np.ndarray | RemoteTokens:
    if dtype not in ("uint16", "uint32"):
        raise NeoError(f"{folder / DATASET_FILE}: dtype '{dtype}' is not uint16 or uint32.")
    path = folder / split / "tokens.bin"
    item = np.dtype(dtype).newbyteorder("<")
    try:
        size = file_size(path)
        if size != num_tokens * item.itemsize:
            raise NeoError(
                f"{path} has {size} bytes where {num_tokens} tokens take "
                f"{num_tokens * item.itemsize}; copy it again, or run neo-jax prepare again."
            )
        if is_remote(path):
            return RemoteTokens(path, item, num_tokens)
        return np.memmap(path, item, mode="r", shape=(num_tokens,))
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
