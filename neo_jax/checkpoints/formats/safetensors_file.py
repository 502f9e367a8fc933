"""Safetensors files, on disk or in the cloud."""

import contextlib
import functools
import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open

from neo_jax.checkpoints.formats.stored import StoredTensor
from neo_jax.errors import NeoError, reason
from neo_jax.files.json_text import MOST_BYTES, parse_json
from neo_jax.files.paths import file_size, is_file, is_remote, read_range

DTYPES = {
    "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64", "I8": "int8"
}  # fmt: skip
CODES = {name: code for code, name in DTYPES.items()}


def open_file(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a safetensors file and returns its tensors by name.

    The safetensors library judges a file on disk; the header is then read once more, since the
    library gives copies of tensors but not where they are.

    Raises:
      NeoError: it is missing or damaged.
    """
    file = None
    try:
        if is_remote(path):
            length, header = _read_remote_header(path)
        else:
            if not is_file(path):
                raise NeoError(f"cannot read {path}: No such file.")
            file = files.enter_context(path.open("rb"))
            length = int.from_bytes(file.read(8), "little")
            if MOST_BYTES < length <= file_size(path):
                raise _DamagedError(f"a header of {length} bytes")
            with safe_open(path, framework="np"):
                header = parse_json(file.read(length), f"the header of {path}")
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
        start, _ = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"])
        view = functools.partial(_view, path, file, dtype, shape, 8 + length + start)
        found[name] = StoredTensor(path, name, dtype, shape, view)
    return found


def _view(
    path: Path, file: BinaryIO | None, dtype: str, shape: tuple[int, ...], offset: int
) -> np.ndarray:
    kind = np.dtype(dtype)
    if file is None:  # in the cloud
        data = read_range(path, offset, offset + math.prod(shape) * kind.itemsize)
        return np.frombuffer(data, kind).reshape(shape)
    if not math.prod(shape):
        return np.empty(shape, kind)
    return np.asarray(np.memmap(file, kind, "r", offset, shape))


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
        header = parse_json(read_range(path, 8, 8 + min(length, MOST_BYTES + 1)), "the header")
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
