"""Writing a folder in Hugging Face's format: config.json, and weights in safetensors."""

import contextlib
import dataclasses
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from neo_jax.checkpoints.formats import CODES, INDEX, SINGLE
from neo_jax.checkpoints.host_device import copy
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError, reason
from neo_jax.files.locks import LOCK, locked
from neo_jax.files.paths import is_remote, make_path, rmtree
from neo_jax.model.tensor_table import Tensor, tensors

T = TypeVar("T")

_STAGING = ".saving-"  # begins the name of a folder whose files are not whole


class Leaf(NamedTuple):
    """A parameter that is yet to be read."""

    dtype: np.dtype  # to write it in
    read: Callable[[], np.ndarray]  # returns it in the canonical form, padded or not


def write_model(
    folder: Path,
    config: ModelConfig,
    leaves: dict[tuple[str, ...], Leaf],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Writes a folder, as `checkpoints.open_model.save_pretrained` has it, with the same arguments.

    Args:
      folder: made where it does not exist.
      config: describes the parameters.
      leaves: every parameter by its path in the canonical tree.
      tokenizer: anything with `save(folder)`, or None.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: the folder cannot be written.
    """
    parts: dict[str, list[tuple[Tensor, Leaf]]] = {}
    for tensor in tensors(config):
        parts.setdefault(tensor.hf_name, []).append((tensor, leaves[tensor.path]))
    # Wider types first, for alignment.
    rows = sorted(map(_Row, parts.values()), key=lambda row: -row.dtype.itemsize)
    write_rows(folder, config.to_hf(), rows, tokenizer, max_shard_bytes)


def groups(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Yields runs of items whose sizes add up to at most `limit`, or single larger ones."""
    group: list[T] = []
    total = 0
    for item in items:
        if group and total + size(item) > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


@contextlib.contextmanager
def new_folder(output: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to write that is new, or empty, and that no other process writes meanwhile.

    Raises:
      NeoError: it holds something, which nobody wants to lose, or cannot be written.
    """
    folder = make_path(output)
    if folder.exists() and not folder.is_dir():
        raise _taken(output)
    with locked(folder, inside=True):
        remove_leftovers(folder)
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise _taken(output)
        yield folder


def _taken(output: str | os.PathLike[str]) -> NeoError:
    return NeoError(f"{output} is there already; choose a new folder, or remove that one.")


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed while they wrote a folder have left in it.

    Args:
      folder: nobody else writes it now.
    """
    for path in folder.glob(f"{_STAGING}*") if folder.is_dir() else ():
        rmtree(path)


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Gives a folder inside `folder` that is gone at the end."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=_STAGING, dir=folder) as name:
            yield Path(name)
        return
    staging: Any = folder / f"{_STAGING}{uuid.uuid4().hex}"
    try:
        yield staging
    finally:
        staging.rmtree(missing_ok=True)


class Row(Protocol):
    """A tensor on its way to a file."""

    @property
    def name(self) -> str:
        """What the file calls it."""

    @property
    def dtype(self) -> np.dtype:
        """How it is written."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How it is written."""

    @property
    def size(self) -> int:
        """The number of its entries."""

    @property
    def num_bytes(self) -> int:
        """What it takes of the file."""

    def stored(self) -> np.ndarray:
        """Reads it."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor on its way to a file, of one parameter or of several that are its parts."""

    parts: list[tuple[Tensor, Leaf]]

    @property
    def name(self) -> str:
        return self.parts[0][0].hf_name

    @property
    def dtype(self) -> np.dtype:
        return max((leaf.dtype for _, leaf in self.parts), key=lambda kind: kind.itemsize)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][0].places["hf"].whole

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def stored(self) -> np.ndarray:
        places = [tensor.places["hf"] for tensor, _ in self.parts]
        copies = [
            copy(tensor.to("hf", leaf.read()), self.dtype, place.shape)
            for (tensor, leaf), place in zip(self.parts, places, strict=True)
        ]
        return copies[0] if len(copies) == 1 else np.concatenate(copies, places[0].axis)


def write_rows(
    folder: Path,
    fields: dict[str, Any],
    rows: Sequence[Row],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Writes a folder; see `write_model`.

    Args:
      folder: made where it does not exist.
      fields: of config.json, but for the dtype.
      rows: the tensors, wider types first.
      tokenizer: anything with `save(folder)`, or None.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: the folder cannot be written.
    """
    shards = list(groups(rows, lambda row: row.num_bytes, max_shard_bytes))
    widest = max((row.dtype for row in rows), key=lambda kind: kind.itemsize)
    hf_config = {**fields, "dtype": widest.name}
    generation = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id")}
    try:
        with _staging(folder) as staging:
            _write_json(staging / "config.json", hf_config)
            _write_json(
                staging / "generation_config.json", {"_from_model_config": True, **generation}
            )
            if tokenizer is not None:
                tokenizer.save(staging)
            names = [
                f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
            ]
            if len(shards) == 1:
                names = [SINGLE]
            else:
                _write_json(staging / INDEX, _index(shards, names))
            for name, group in zip(names, shards, strict=True):
                _write_weights(staging / name, group)
            _publish(staging, folder)
    except OSError as error:
        raise NeoError(f"cannot save to {folder}: {reason(error)}.") from error


def _write_weights(path: Path, rows: Sequence[Row]) -> None:
    """Writes one safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in rows:
        start, end = end, end + row.num_bytes
        header[row.name] = {
            "dtype": CODES[row.dtype.name],
            "shape": row.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for row in rows:
            file.write(row.stored().reshape(-1).view(np.uint8).data)
        if not is_remote(path):
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what it renames


def _index(shards: Sequence[Sequence[Row]], names: Sequence[str]) -> dict[str, Any]:
    rows = [row for group in shards for row in group]
    return {
        "metadata": {
            "total_parameters": sum(row.size for row in rows),
            "total_size": sum(row.num_bytes for row in rows),
        },
        "weight_map": {
            row.name: name for name, group in zip(names, shards, strict=True) for row in group
        },
    }


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _publish(staging: Path, folder: Path) -> None:
    """Moves whole files into the folder; the one that readers open first goes last."""
    new = {path.name for path in staging.iterdir()}
    entry = SINGLE if SINGLE in new else INDEX
    # An old index over new shards, or old weights before a new index, would read as a whole model.
    (folder / INDEX).unlink(missing_ok=True)
    if entry == INDEX:
        (folder / SINGLE).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == entry):
        (staging / name).replace(folder / name)
    for path in folder.glob("model-*-of-*.safetensors"):
        if path.name not in new:
            path.unlink()
