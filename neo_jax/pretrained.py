"""Checkpoints in Hugging Face's format: finding them, reading them into shards, writing them.

A checkpoint is a folder with config.json and the weights in safetensors: one `model.safetensors`,
or shards that `model.safetensors.index.json` lists.
"""

import contextlib
import dataclasses
import importlib.resources
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from neo_jax.axes import Array, Params
from neo_jax.config import ModelConfig, read_json
from neo_jax.errors import NeoError, suggest
from neo_jax.names import Tensor, tensors

T = TypeVar("T")

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
_CODES = {name: code for code, name in _DTYPES.items()}

_PUBLISHED = {
    "gpt-neo-125m": "EleutherAI/gpt-neo-125m",
    "gpt-neo-1.3b": "EleutherAI/gpt-neo-1.3B",
    "gpt-neo-2.7b": "EleutherAI/gpt-neo-2.7B",
}
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "*.model",
]  # fmt: skip

# Buffers that old versions of transformers saved with every attention layer.
_STALE = re.compile(r"(^|\.)h\.\d+\.attn\.attention\.(bias|masked_bias)$")

_BATCH_BYTES = 64 << 20  # tensors travel to the devices together up to this size
_BLOCK_BYTES = 512 << 10  # of a transposition: what the cache of a core holds


def resolve(
    model: str | os.PathLike[str] | None, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Returns the folder of a checkpoint, downloading it where need be.

    Args:
      model: a folder; a published model, "gpt-neo-1.3b"; a name on the Hugging Face hub,
        "org/name"; or None for the small model that comes with the package.
      revision: branch, tag or commit on the hub.
      token: for gated and private repositories; by default what `hf auth login` or HF_TOKEN set.

    Raises:
      NeoError: nothing has this name, or the hub does not hand it out; the message says which.
    """
    if model is None:
        folder = Path(str(importlib.resources.files("neo_jax") / "bundled"))
        if not folder.is_dir():
            raise NeoError("this installation came without its bundled model; name a model.")
    else:
        name = os.fspath(model)
        folder = Path(name).expanduser()
        if folder.is_file():
            raise NeoError(f"{name} is a file; name the folder that holds it.")
        if not name or not folder.is_dir():
            return _download(_hub_name(name), revision, token)
    if revision is not None:
        raise NeoError(f"revision '{revision}' is for names on the hub; {folder} is a folder.")
    return folder


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config.json of a checkpoint.

    Raises:
      NeoError: it is missing, damaged, or describes another architecture.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise NeoError(f"{folder} holds no config.json; name the folder of a GPT-Neo checkpoint.")
    return ModelConfig.from_hf(read_json(path), source=str(path))


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Params | None = None,
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
        process then reads only the slices that its devices hold. None puts all on the default
        device, uncommitted.

    Raises:
      NeoError: files are missing or damaged, or hold other tensors than `config` describes; the
        message names the file, the tensor and the mend.
    """
    cast_to = None if dtype is None else _float_dtype(dtype)
    placement = None if shardings is None else flatten_dict(shardings)
    params: dict[tuple[str, ...], Array] = {}
    with contextlib.ExitStack() as files:
        source, found = _open_weights(Path(folder), files)
        rows = _match(tensors(config), found, source)
        for batch in _groups(rows, lambda row: row[1].num_bytes, _BATCH_BYTES):
            views = [tensor.from_hf(stored.view()) for tensor, stored in batch]
            dtypes = [cast_to or _float_dtype(view.dtype) for view in views]
            paths = [tensor.path for tensor, _ in batch]
            if placement is None:
                arrays = jax.device_put(list(map(_copy, views, dtypes)))
            else:
                arrays = list(map(_shard, views, dtypes, [placement[path] for path in paths]))
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
    are replaced. The host holds one tensor at a time.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      params: the canonical tree of arrays, every shard of which this process can reach.
      tokenizer: anything with `save(folder)`, or None to leave the folder's tokenizer files alone.
      dtype: a floating-point type to store; None keeps that of each array.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: `params` is not what `config` describes, or the folder cannot be written.
    """
    folder = Path(folder)
    rows = _to_write(config, params, dtype)
    shards = list(_groups(rows, lambda row: row.num_bytes, max_shard_bytes))
    widest = max((row.dtype for row in rows), key=lambda kind: kind.itemsize)
    hf_config = {**config.to_hf(), "dtype": widest.name}
    generation = {name: hf_config[name] for name in ("bos_token_id", "eos_token_id")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as name:
            staging = Path(name)
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
                names = [_SINGLE]
            else:
                _write_json(staging / _INDEX, _index(shards, names))
            for name, shard in zip(names, shards, strict=True):
                _write_weights(staging / name, shard)
            _publish(staging, folder)
    except OSError as error:
        raise NeoError(f"cannot save to {folder}: {error.strerror or error}.") from error


def _hub_name(name: str) -> str:
    """Returns "org/name" for a published model or a name that already has this form."""
    if name.lower() in _PUBLISHED:
        return _PUBLISHED[name.lower()]
    if not _HUB_NAME.fullmatch(name):
        raise NeoError(
            f"there is no folder and no published model '{name}'; give a folder, a hub name such "
            f"as org/name, or a published model.{suggest(name.lower(), _PUBLISHED)}"
        )
    return name


def _download(name: str, revision: str | None, token: str | None) -> Path:
    """Returns the folder of a snapshot in the hub's cache; the hub library reports progress."""
    import huggingface_hub  # slow to import, and needed for nothing else
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],  # sub-folders hold other formats and training checkpoints
        )
    except errors.GatedRepoError as error:
        raise NeoError(
            f"'{name}' is gated: accept its licence at https://huggingface.co/{name}, then pass "
            "your token or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise NeoError(
            f"'{name}' has no revision '{revision}'; see https://huggingface.co/{name}/commits."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise NeoError(
            f"'{name}' is neither a folder nor a repository on the Hugging Face hub; check the "
            "name, and for a private repository pass your token or set HF_TOKEN."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            mend = "HF_HUB_OFFLINE is set: unset it to download, or name a folder"
        else:
            mend = "the hub does not answer: check the connection, or name a folder"
        raise NeoError(
            f"'{name}' is no folder, no whole copy of it is in the hub's cache, and {mend}."
        ) from error
    except (OSError, errors.HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NeoError(
            f"could not download '{name}' ({reason}); try again, or name a folder."
        ) from error
    return Path(folder)


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in an open safetensors file."""

    path: Path
    file: BinaryIO
    name: str
    code: str  # the format's name of its dtype
    shape: tuple[int, ...]
    offset: int  # in bytes, from the start of the file
    num_bytes: int

    def view(self) -> np.ndarray:
        """Maps the tensor, and only it: the memory is given back with the last view."""
        dtype = np.dtype(_DTYPES[self.code])
        return np.asarray(np.memmap(self.file, dtype, "r", self.offset, self.shape))


def _open_weights(folder: Path, files: contextlib.ExitStack) -> tuple[Path, dict[str, _Stored]]:
    """Returns the file that says what the folder holds, and every tensor there by its name."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return single, _read_header(single, files)
    if not index.is_file():
        raise NeoError(
            f"{folder} holds no {_SINGLE}; where it has only pytorch_model.bin, convert that with "
            "transformers' save_pretrained(folder, safe_serialization=True)."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise NeoError(f"{index} has no weight_map of file names; download or copy it again.")
    shards: dict[str, dict[str, _Stored]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise NeoError(f"{index} names {shard}, which is not there; download or copy it again.")
        shards[shard] = _read_header(folder / shard, files)
    found = {name: stored for shard in shards.values() for name, stored in shard.items()}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise NeoError(
                f"{index} says that {shard} holds {name}, which it does not; download or copy "
                "both again."
            )
        found[name] = shards[shard][name]
    return index, found


def _read_header(path: Path, files: contextlib.ExitStack) -> dict[str, _Stored]:
    """Opens a safetensors file and returns its tensors by name.

    The safetensors library judges the file; the header is then read once more, since the library
    gives copies of tensors but not where they lie.
    """
    try:
        with safe_open(path, framework="np"):
            file = files.enter_context(path.open("rb"))
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    except SafetensorError as error:
        raise NeoError(
            f"{path} is damaged or cut short ({error}); download or copy it again. (A Git clone "
            "holds the weights only after 'git lfs pull'.)"
        ) from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {error.strerror or error}.") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = _Stored(
            path, file, name, entry["dtype"], shape, 8 + length + start, end - start
        )
    return found


def _match(
    table: Sequence[Tensor], found: dict[str, _Stored], source: Path
) -> list[tuple[Tensor, _Stored]]:
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


def _check(stored: _Stored, tensor: Tensor) -> None:
    if stored.shape != tensor.hf_shape:
        raise NeoError(
            f"{stored.path}: {stored.name} is {list(stored.shape)}, but config.json asks for "
            f"{list(tensor.hf_shape)}; is config.json of the same model?"
        )
    if stored.code not in _DTYPES:
        raise NeoError(
            f"{stored.path}: {stored.name} is stored as {stored.code}; save the checkpoint as one "
            f"of {', '.join(_DTYPES.values())}."
        )


def _float_dtype(dtype: DTypeLike) -> np.dtype:
    """Returns the numpy dtype that JAX will use for `dtype`."""
    try:
        named = np.dtype(dtype)
    except TypeError:
        named = None
    if named is None or named.name not in _CODES:
        raise NeoError(f"{dtype!r} is no floating-point type.{suggest(str(dtype), _CODES)}")
    return jax.dtypes.canonicalize_dtype(named)


def _copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a contiguous copy, block by block along the outermost axis of what is stored.

    numpy transposes a large matrix with a cache miss for every element; within a block that fits
    the cache it is about five times as fast. A memory map is read in order.
    """
    out = np.empty(view.shape, dtype)
    axis = int(np.argmax(view.strides))
    step = max(1, _BLOCK_BYTES * view.shape[axis] // view.nbytes)
    for start in range(0, view.shape[axis], step):
        block = (slice(None),) * axis + (slice(start, start + step),)
        out[block] = view[block]
    return out


def _shard(view: np.ndarray, dtype: np.dtype, sharding: jax.sharding.Sharding) -> Array:
    """Places `view` on its devices, copying each distinct slice once."""
    pieces: dict[tuple, np.ndarray] = {}

    def piece(index: Any) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in pieces:
            pieces[key] = _copy(view[index], dtype)
        return pieces[key]

    return jax.make_array_from_callback(view.shape, sharding, piece, dtype=dtype)


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
    def num_bytes(self) -> int:
        return self.array.size * self.dtype.itemsize

    def stored(self) -> np.ndarray:
        return _copy(self.tensor.to_hf(_to_host(self.array)), self.dtype)


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
    shards = [shard.data for shard in array.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))


def _write_weights(path: Path, rows: Sequence[_Row]) -> None:
    """Writes one safetensors file, a tensor at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for row in rows:
        start, end = end, end + row.num_bytes
        header[row.tensor.hf_name] = {
            "dtype": _CODES[row.dtype.name],
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
        file.flush()
        os.fsync(file.fileno())  # a rename may reach the disk before what it renames


def _index(shards: Sequence[Sequence[_Row]], names: Sequence[str]) -> dict[str, Any]:
    rows = [row for shard in shards for row in shard]
    return {
        "metadata": {
            "total_parameters": sum(row.array.size for row in rows),
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
    entry = _SINGLE if _SINGLE in new else _INDEX
    # An old index over new shards, or old weights before a new index, would read as a whole model.
    (folder / _INDEX).unlink(missing_ok=True)
    if entry == _INDEX:
        (folder / _SINGLE).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == entry):
        os.replace(staging / name, folder / name)
    for path in folder.glob("model-*-of-*.safetensors"):
        if path.name not in new:
            path.unlink()
