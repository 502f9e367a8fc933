"""Checkpoints in Hugging Face's format: reading them into shards, writing them.

A checkpoint is a folder with config.json and the weights in safetensors: one `model.safetensors`,
or shards that `model.safetensors.index.json` lists.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from neo_jax import distributed
from neo_jax.axes import Array, Params
from neo_jax.config import ModelConfig, read_json
from neo_jax.errors import NeoError, reason, suggest
from neo_jax.names import Tensor, tensors
from neo_jax.paths import is_remote, make_path
from neo_jax.weights import CODES, DTYPES, INDEX, SINGLE, StoredTensor, open_weights

T = TypeVar("T")

# Buffers that old versions of transformers saved with every attention layer.
_STALE = re.compile(r"(^|\.)h\.\d+\.attn\.attention\.(bias|masked_bias)$")

_BATCH_BYTES = 64 << 20  # tensors travel to the devices together up to this size
_BLOCK_BYTES = 512 << 10  # of a transposition: what the cache of a core holds


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config.json of a checkpoint.

    Raises:
      NeoError: it is missing, damaged, or describes another architecture.
    """
    path = make_path(folder) / "config.json"
    if not path.is_file():
        raise NeoError(f"{folder} holds no config.json; name the folder of a GPT-Neo checkpoint.")
    return ModelConfig.from_hf(read_json(path), source=str(path))


def stored_dtypes(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the names of the dtypes that the weights of a folder are stored in; reads headers."""
    with contextlib.ExitStack() as files:
        _, found = open_weights(make_path(folder), files)
    return sorted({DTYPES.get(stored.code, stored.code) for stored in found.values()})


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Params | None = None,
    each: Callable[[Tensor, Array], Any] | None = None,
) -> Params:
    """Reads the weights of a checkpoint into the canonical parameter tree.

    Tensors stream from a memory map, through a transposition, to the devices: beyond the result,
    the host holds about the largest of them. The arrays are copies, also on a CPU, where JAX could
    alias the map: a file that is overwritten later must not change a model that runs.

    Args:
      folder: what `resolve` returned.
      config: what `read_config` returned.
      dtype: a floating-point type for all parameters; None keeps the stored one. (float64 becomes
        float32 unless JAX has 64-bit types enabled.)
      shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; every
        process then copies only what its devices hold. None: the default device, uncommitted.
      each: what to make of each parameter as it comes to its devices; only that is kept.

    Raises:
      NeoError: files are missing or damaged, or hold other tensors than `config` describes; the
        message names the file, the tensor and the mend.
    """
    cast_to = None if dtype is None else _float_dtype(dtype)
    placement = None if shardings is None else flatten_dict(shardings)
    params: dict[tuple[str, ...], Array] = {}
    with contextlib.ExitStack() as files:
        source, found = open_weights(make_path(folder), files)
        rows = _match(tensors(config), found, source)
        for batch in _groups(rows, lambda row: row[1].num_bytes, _BATCH_BYTES):
            views = [tensor.from_hf(stored.view()) for tensor, stored in batch]
            dtypes = [cast_to or _float_dtype(view.dtype) for view in views]
            paths = [tensor.path for tensor, _ in batch]
            shapes = [tensor.shape for tensor, _ in batch]
            if placement is None:
                arrays = jax.device_put(list(map(_copy, views, dtypes, shapes)))
            else:
                places = [placement[path] for path in paths]
                arrays = list(map(_shard, views, dtypes, shapes, places))
            if each is not None:
                arrays = list(map(each, [tensor for tensor, _ in batch], arrays))
            # Transfers are asynchronous: without a wait, copies of the whole model could queue up.
            params.update(zip(paths, jax.block_until_ready(arrays), strict=True))
    return unflatten_dict(params)


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that this package and transformers' GPTNeoForCausalLM read.

    Files are written aside and renamed when all are whole; weights that the folder held before
    are replaced. The host holds one tensor at a time. Where `params` lie on several processes, all
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
    rows = _to_write(config, params, dtype)
    several = not all(getattr(row.array, "is_fully_addressable", True) for row in rows)
    if several and not distributed.is_leader():
        for row in rows:
            _to_host(row.array)  # has a part in it
    else:
        _save(make_path(folder), config, rows, tokenizer, max_shard_bytes)
    if several:
        distributed.barrier("saved")


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Gives a folder inside `folder` that is gone at the end."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            yield Path(name)
        return
    staging: Any = folder / f".saving-{uuid.uuid4().hex}"
    try:
        yield staging
    finally:
        staging.rmtree(missing_ok=True)


def _match(
    table: Sequence[Tensor], found: dict[str, StoredTensor], source: Path
) -> list[tuple[Tensor, StoredTensor]]:
    """Pairs every parameter with what is stored for it, and accounts for all that is stored."""
    stored = {
        f"transformer.{name.removeprefix('transformer.')}": tensor
        for name, tensor in found.items()
        if not _STALE.search(name) and name != "lm_head.weight"
    }
    embedding = table[0]
    head = found.get("lm_head.weight")
    if head is not None:
        _check(head, embedding)
        # The two are one matrix; safetensors.torch.save_model keeps whichever sorts first.
        stored.setdefault(embedding.hf_name, head)
    missing = [tensor.hf_name for tensor in table if tensor.hf_name not in stored]
    if missing:
        raise NeoError(
            f"{source} lacks {len(missing)} of {len(table)} tensors, the first {missing[0]}; is "
            "config.json of the same model?"
        )
    known = {tensor.hf_name for tensor in table}
    unexpected = [tensor.name for name, tensor in stored.items() if name not in known]
    if unexpected:
        raise NeoError(
            f"{source} holds {len(unexpected)} tensors that a GPT-Neo of this config.json has not, "
            f"the first {unexpected[0]}; is config.json of the same model?"
        )
    rows = [(tensor, stored[tensor.hf_name]) for tensor in table]
    for tensor, entry in rows:
        _check(entry, tensor)
    return rows


def _check(stored: StoredTensor, tensor: Tensor) -> None:
    if stored.shape != tensor.hf_shape:
        raise NeoError(
            f"{stored.path}: {stored.name} is {list(stored.shape)}, but config.json asks for "
            f"{list(tensor.hf_shape)}; is config.json of the same model?"
        )
    if stored.code not in DTYPES:
        raise NeoError(
            f"{stored.path}: {stored.name} is stored as {stored.code}; save the checkpoint as one "
            f"of {', '.join(DTYPES.values())}."
        )


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the numpy dtype that JAX will use for `dtype`."""
    try:
        named = np.dtype(dtype)
    except TypeError:
        named = None
    if named is None or named.name not in CODES:
        raise NeoError(f"{dtype!r} is no floating-point type.{suggest(str(dtype), CODES)}")
    return jax.dtypes.canonicalize_dtype(named)


def _copy(view: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a contiguous copy, filled up with zeros to `shape`.

    numpy transposes a large matrix with a cache miss for every element; block by block along the
    outermost axis of what is stored, where a block fits the cache, it is about five times as fast.
    A memory map is read in order.
    """
    whole = np.empty(shape, dtype)
    out, padding = np.split(whole, [len(view)])  # only the vocabulary, a first axis, has any
    padding[:] = 0
    axis = int(np.argmax(view.strides))
    step = max(1, _BLOCK_BYTES * view.shape[axis] // max(view.nbytes, 1))
    for start in range(0, view.shape[axis], step):
        block = (slice(None),) * axis + (slice(start, start + step),)
        out[block] = view[block]
    return whole


def _shard(
    view: np.ndarray, dtype: np.dtype, shape: tuple[int, ...], sharding: jax.sharding.Sharding
) -> Array:
    """Places `view`, padded to `shape`, on its devices, copying each distinct slice once."""
    pieces: dict[tuple, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        parts = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        key = tuple((part.start, part.stop) for part in parts)
        if key not in pieces:
            # Indices beyond what is stored are cut off by numpy, and the padding fills in.
            pieces[key] = _copy(view[index], dtype, tuple(map(len, parts)))
        return pieces[key]

    return jax.make_array_from_callback(shape, sharding, piece, dtype=dtype)


def _groups(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
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


@dataclasses.dataclass(frozen=True)
class _Row:
    """A parameter on its way to a file."""

    tensor: Tensor
    array: Array | np.ndarray
    dtype: np.dtype

    @property
    def size(self) -> int:
        return math.prod(self.tensor.hf_shape)

    @property
    def num_bytes(self) -> int:
        return self.size * self.dtype.itemsize

    def stored(self) -> np.ndarray:
        return _copy(self.tensor.to_hf(_to_host(self.array)), self.dtype, self.tensor.hf_shape)


def _to_write(config: ModelConfig, params: Params, dtype: DTypeLike | None) -> list[_Row]:
    """Pairs every parameter with its row of the name table; wider types first, for alignment."""
    leaves = flatten_dict(params)
    rows = []
    for tensor in tensors(config):
        leaf, name = leaves.pop(tensor.path, None), "/".join(tensor.path)
        if leaf is None:
            raise NeoError(f"params has no leaf {name}, which its config asks for.")
        if not isinstance(leaf, Array | np.ndarray):
            raise NeoError(f"{name} is a {type(leaf).__name__}; merge it into an array to save it.")
        if leaf.shape != tensor.shape:
            raise NeoError(f"{name} is {leaf.shape}, but its config asks for {tensor.shape}.")
        rows.append(_Row(tensor, leaf, _float_dtype(leaf.dtype if dtype is None else dtype)))
    if leaves:
        raise NeoError(f"params has a leaf {'/'.join(next(iter(leaves)))} that no GPT-Neo has.")
    return sorted(rows, key=lambda row: -row.dtype.itemsize)


def _to_host(array: Array | np.ndarray) -> np.ndarray:
    """Copies an array to the host through an alias, since JAX keeps the copy with the array."""
    if isinstance(array, np.ndarray):
        return array
    if not array.is_fully_addressable:
        return distributed.to_host(array)
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def _save(
    folder: Path, config: ModelConfig, rows: list[_Row], tokenizer: Any, max_shard_bytes: int
) -> None:
    shards = list(_groups(rows, lambda row: row.num_bytes, max_shard_bytes))
    widest = max((row.dtype for row in rows), key=lambda kind: kind.itemsize)
    hf_config = {**config.to_hf(), "dtype": widest.name}
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
            for name, shard in zip(names, shards, strict=True):
                _write_weights(staging / name, shard)
            _publish(staging, folder)
    except OSError as error:
        raise NeoError(f"cannot save to {folder}: {reason(error)}.") from error


def _write_weights(path: Path, rows: Sequence[_Row]) -> None:
    """Writes one safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in rows:
        start, end = end, end + row.num_bytes
        header[row.tensor.hf_name] = {
            "dtype": CODES[row.dtype.name],
            "shape": row.tensor.hf_shape,
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


def _index(shards: Sequence[Sequence[_Row]], names: Sequence[str]) -> dict[str, Any]:
    rows = [row for shard in shards for row in shard]
    return {
        "metadata": {
            "total_parameters": sum(row.size for row in rows),
            "total_size": sum(row.num_bytes for row in rows),
        },
        "weight_map": {
            row.tensor.hf_name: name
            for name, shard in zip(names, shards, strict=True)
            for row in shard
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
