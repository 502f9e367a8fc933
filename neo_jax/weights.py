"""Weights in safetensors files, opened for reading tensor by tensor, on disk or in the cloud."""

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from neo_jax.config import read_json
from neo_jax.errors import NeoError, reason
from neo_jax.paths import file_size, is_remote, read_range

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
CODES = {name: code for code, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open safetensors file."""

    path: Path
    file: BinaryIO | None  # None in the cloud
    name: str
    code: str  # the format's name of its dtype
    shape: tuple[int, ...]
    offset: int  # in bytes, from the start of the file
    num_bytes: int

    def view(self) -> np.ndarray:
        """Maps the tensor, and only it: the memory is given back with the last view.

        In the cloud there is nothing to map: the tensor is read.
        """
        dtype = np.dtype(DTYPES[self.code])
        if self.file is None:
            data = read_range(self.path, self.offset, self.offset + self.num_bytes)
            return np.frombuffer(data, dtype).reshape(self.shape)
        return np.asarray(np.memmap(self.file, dtype, "r", self.offset, self.shape))


def open_weights(folder: Path, files: contextlib.ExitStack) -> tuple[Path, dict[str, StoredTensor]]:
    """Returns the file that says what the folder holds, and every tensor there by its name.

    Raises:
      NeoError: files are missing, damaged, or contradict each other.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file():
        return single, open_file(single, files)
    if not index.is_file():
        raise NeoError(
            f"{folder} holds no {SINGLE}; where it has only pytorch_model.bin, convert that with "
            "transformers' save_pretrained(folder, safe_serialization=True)."
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise NeoError(f"{index} has no weight_map of file names; download or copy it again.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise NeoError(f"{index} names {shard}, which is not there; download or copy it again.")
        shards[shard] = open_file(folder / shard, files)
    found = {name: stored for shard in shards.values() for name, stored in shard.items()}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise NeoError(
                f"{index} says that {shard} holds {name}, which it does not; download or copy "
                "both again."
            )
        found[name] = shards[shard][name]
    return index, found


def open_file(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a safetensors file and returns its tensors by name.

    The safetensors library judges a file on disk; the header is then read once more, since the
    library gives copies of tensors but not where they lie.

    Raises:
      NeoError: it is missing or damaged.
    """
    file = None
    try:
        if is_remote(path):
            length, header = _read_remote_header(path)
        else:
            with safe_open(path, framework="np"):
                file = files.enter_context(path.open("rb"))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, _DamagedError) as error:
        raise NeoError(
            f"{path} is damaged or cut short ({error}); download or copy it again. (A Git clone "
            "holds the weights only after 'git lfs pull'.)"
        ) from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        found[name] = StoredTensor(
            path, file, name, entry["dtype"], shape, 8 + length + start, end - start
        )
    return found


class _DamagedError(Exception):
    """A header that does not describe its file."""


def _read_remote_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Returns the length of a header and the header, once it accounts for every byte of the file.

    The safetensors library cannot judge a file of which it does not have all.
    """
    size = file_size(path)
    length = int.from_bytes(read_range(path, 0, 8), "little") if size >= 8 else size
    if 8 + length > size:
        raise _DamagedError("no whole header")
    try:
        header = json.loads(read_range(path, 8, 8 + length))
        end = 0
        entries = (entry for name, entry in header.items() if name != "__metadata__")
        for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
            start, stop = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])  # None for types that no GPT-Neo is loaded from
            needed = dtype and math.prod(entry["shape"]) * np.dtype(dtype).itemsize
            if start != end or stop < start or needed not in (None, stop - start):
                raise _DamagedError("the tensors do not follow each other")
            end = stop
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _DamagedError(f"not a header: {reason(error)}") from error
    if 8 + length + end != size:
        raise _DamagedError(f"{size} bytes where the header speaks of {8 + length + end}")
    return length, header
