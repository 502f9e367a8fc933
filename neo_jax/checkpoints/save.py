"""Writing a model: config.json in Hugging Face's terms, and weights in safetensors."""

import contextlib
import functools
import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.formats import CODES, INDEX, SINGLE
from neo_jax.checkpoints.host_device import copy, float_dtype, to_host
from neo_jax.config import ModelConfig
from neo_jax.devices import processes
from neo_jax.errors import NeoError, reason
from neo_jax.files.locks import LOCK, locked
from neo_jax.files.paths import is_remote, make_path, rmtree
from neo_jax.model.prefix_mapper import MAPPER
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.ops.int8 import Int8
from neo_jax.transforms.quantize import is_rounded

T = TypeVar("T")

SHARD_BYTES = 5_000_000_000
"""Above this size weights go to several files."""

MARK, METHOD = "quantization_config", {"quant_method": "neo_jax_int8"}
"""The field of config.json, and its value, of a folder of int8 weights.

Its tensors have the names of the canonical tree, joined by dots, and its layout; that of whole
numbers has a scale, NAME_scale. What reads other checkpoints refuses it.
"""

_STAGING = ".saving-"  # begins the name of a folder whose files are not whole


class Leaf(NamedTuple):
    """A parameter that is yet to be read."""

    dtype: np.dtype  # to write it in
    read: Callable[[], np.ndarray]  # returns it in the canonical form, padded or not


class FileTensor(NamedTuple):
    """A tensor on its way to a file."""

    name: str
    dtype: np.dtype  # how it is written
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """What it takes of the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def _alignment(row: FileTensor) -> int:
    """Sorts wider types first, so that all are aligned."""
    return -row.dtype.itemsize


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a checkpoint that this package and transformers read.

    Files are written aside and renamed when all are whole; weights that the folder held before
    are replaced. The host holds one tensor at a time. Where `params` are on several processes, all
    of them call this: the first writes, and all return when the files are there.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      params: the canonical tree of arrays.
      tokenizer: anything with `save(folder)`, or None to leave the folder's tokenizer files alone.
      dtype: a floating-point type to store; None keeps that of each array.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: `params` is not what `config` describes, or the folder cannot be written.
    """
    _check_is_whole(params)
    left, leaves = flatten_dict(params), {}
    for tensor in tensors(config):
        leaf, name = left.pop(tensor.path, None), "/".join(tensor.path)
        if leaf is None:
            raise NeoError(f"params has no leaf {name}, which its config asks for.")
        if not isinstance(leaf, Array | np.ndarray):
            raise NeoError(f"{name} is a {type(leaf).__name__}; merge it into an array to save it.")
        if leaf.shape != tensor.shape:
            raise NeoError(f"{name} is {leaf.shape}, but its config asks for {tensor.shape}.")
        kind = float_dtype(leaf.dtype if dtype is None else dtype)
        leaves[tensor.path] = Leaf(kind, functools.partial(to_host, leaf))
    if left:
        raise NeoError(f"params has a leaf {'/'.join(next(iter(left)))} that its config has not.")
    rows = _hf_rows(config, leaves)
    _save(params, make_path(folder), config.to_hf(), rows, tokenizer, max_shard_bytes)


def save_int8(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a quantized model so that this package reads it back exactly; see `save_pretrained`.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      params: what `neo_jax.transforms.quantize.quantize` returned.
      tokenizer: anything with `save(folder)`, or None.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: weights are not int8, or the folder cannot be written.
    """
    _check_is_whole(params)
    leaves, arrays = flatten_dict(params), {}
    for tensor in tensors(config):
        leaf, name = leaves[tensor.path], ".".join(tensor.path)
        if is_rounded(tensor) != isinstance(leaf, Int8):
            raise NeoError(f"{name} is no int8 weight; save the model as floats, or quantize it.")
        if isinstance(leaf, Int8):
            arrays[f"{name}_scale"], leaf = leaf.scale, leaf.values
        arrays[name] = leaf
    rows = [
        FileTensor(name, np.dtype(array.dtype), array.shape, functools.partial(to_host, array))
        for name, array in arrays.items()
    ]
    rows.sort(key=_alignment)
    fields = {**config.to_hf(), MARK: METHOD}
    _save(params, make_path(folder), fields, rows, tokenizer, max_shard_bytes)


def _check_is_whole(params: Params) -> None:
    for name in (PROMPT, MAPPER):
        if name in params:
            raise NeoError(
                f"the model has {name}, which no folder of a model can hold; its adapter does: "
                "name that, or the model that it is for."
            )


def write_model(
    folder: Path,
    config: ModelConfig,
    leaves: Mapping[tuple[str, ...], Leaf],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Writes a folder as `save_pretrained` does, of every parameter by its path.

    Raises:
      NeoError: the folder cannot be written.
    """
    _write(folder, config.to_hf(), _hf_rows(config, leaves), tokenizer, max_shard_bytes)


def _save(
    params: Params, folder: Path, fields: dict[str, Any], rows: list[FileTensor], *rest: Any
) -> None:
    """Writes a folder with `_write` in the first of the processes that hold a part of `params`."""
    arrays = jax.tree.leaves(params)
    several = not all(getattr(array, "is_fully_addressable", True) for array in arrays)
    if several and not processes.is_leader():
        for row in rows:
            row.read()  # has a part in it
    else:
        _write(folder, fields, rows, *rest)
    if several:
        processes.barrier("saved")


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
    taken = NeoError(f"{output} is there already; choose a new folder, or remove that one.")
    if folder.exists() and not folder.is_dir():
        raise taken
    with locked(folder, inside=True):
        remove_leftovers(folder)
        if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
            raise taken
        yield folder


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


def _hf_rows(config: ModelConfig, leaves: Mapping[tuple[str, ...], Leaf]) -> list[FileTensor]:
    """Returns Hugging Face's tensors, of one parameter or of several that are its parts."""
    parts: dict[str, list[tuple[Tensor, Leaf]]] = {}
    for tensor in tensors(config):
        parts.setdefault(tensor.hf_name, []).append((tensor, leaves[tensor.path]))
    rows = []
    for name, several in parts.items():
        dtype = max((leaf.dtype for _, leaf in several), key=lambda kind: kind.itemsize)
        shape = several[0][0].places["hf"].whole
        rows.append(FileTensor(name, dtype, shape, functools.partial(_joined, several, dtype)))
    return sorted(rows, key=_alignment)


def _joined(parts: Sequence[tuple[Tensor, Leaf]], dtype: np.dtype) -> np.ndarray:
    places = [tensor.places["hf"] for tensor, _ in parts]
    copies = [
        copy(tensor.to("hf", leaf.read()), dtype, place.shape)
        for (tensor, leaf), place in zip(parts, places, strict=True)
    ]
    return copies[0] if len(copies) == 1 else np.concatenate(copies, places[0].axis)


def _write(
    folder: Path,
    fields: dict[str, Any],
    rows: Sequence[FileTensor],
    tokenizer: Any,
    max_shard_bytes: int,
) -> None:
    """Writes a folder: `fields` and the dtype into config.json, and the tensors."""
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


def _write_weights(path: Path, rows: Sequence[FileTensor]) -> None:
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
            file.write(np.ascontiguousarray(row.read()).reshape(-1).view(np.uint8).data)
        if not is_remote(path):
            file.flush()
            os.fsync(file.fileno())  # a rename may reach the disk before what it renames


def _index(shards: Sequence[Sequence[FileTensor]], names: Sequence[str]) -> dict[str, Any]:
    rows = [row for group in shards for row in group]
    return {
        "metadata": {
            "total_parameters": sum(math.prod(row.shape) for row in rows),
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
