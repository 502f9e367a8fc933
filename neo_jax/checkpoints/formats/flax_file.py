"""Files of `flax.serialization`, flax_model.msgpack: nested names, and arrays as extensions.

The format: https://github.com/msgpack/msgpack/blob/master/spec.md. The library for it copies every
array; here they are parts of the mapped file.
"""

import contextlib
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neo_jax.checkpoints.formats.stored import FLOATS, StoredTensor
from neo_jax.errors import NeoError, brief, reason
from neo_jax.files.paths import file_size, is_remote, read_range

_ARRAY = 1  # flax's extension for arrays: shape, dtype, bytes
_CHUNKED = "__msgpack_chunked_array__"  # flax cuts what is larger than 1 GiB
_DEEPEST = 32
_MOST_OBJECTS = 250_000  # a byte may become one of a hundred bytes; a tensor takes about three
_MOST_OF_AN_ARRAY = 100


class _DamagedError(Exception):
    """Bytes that are no MessagePack, or not such as flax writes."""


class _Extension(NamedTuple):
    code: int
    data: memoryview


def open_file(path: Path, files: contextlib.ExitStack) -> dict[str, StoredTensor]:
    """Opens a file of arrays; their names are joined by slashes.

    Raises:
      NeoError: it is missing or damaged.
    """
    del files  # the views of arrays keep the file mapped
    try:
        if is_remote(path):
            data = memoryview(read_range(path, 0, file_size(path)))
        else:
            with path.open("rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        tree, end = _read(data, 0, iter(range(_MOST_OBJECTS)))
        if end != len(data):
            raise _DamagedError("bytes follow its end")
        if not isinstance(tree, dict):
            raise _DamagedError("no names")
        tree = tree["params"] if tree.keys() == {"params"} else tree
        return {name: _stored(path, name, leaf) for name, leaf in _leaves(tree)}
    except (_DamagedError, ValueError) as error:  # mmap refuses what is empty
        raise NeoError(
            f"{path} is damaged or cut short ({error}); download or copy it again."
        ) from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error


def _leaves(tree: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and _CHUNKED not in value:
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _stored(path: Path, name: str, leaf: Any) -> StoredTensor:
    if isinstance(leaf, dict):
        shape = _numbers(_ordered(leaf.get("shape")))
        chunks = [_array(chunk) for chunk in _ordered(leaf.get("chunks"))]
        if len({(chunk.ndim, chunk.dtype) for chunk in chunks}) != 1 or chunks[0].ndim != 1:
            raise _DamagedError(f"{name} has parts of several kinds")
        if sum(chunk.size for chunk in chunks) != math.prod(shape):
            raise _DamagedError(f"{name} lacks parts")
        dtype = chunks[0].dtype
        return StoredTensor(
            path, name, dtype.name, shape, lambda: np.concatenate(chunks).reshape(shape)
        )
    array = _array(leaf)
    return StoredTensor(path, name, array.dtype.name, array.shape, lambda: array)


def _ordered(value: Any) -> list[Any]:
    """Returns a tuple as flax writes it: {"0": ..., "1": ...}."""
    if not isinstance(value, dict) or [*value] != [str(i) for i in range(len(value))]:
        raise _DamagedError("no parts of an array")
    return list(value.values())


def _numbers(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(n) is int and n >= 0 for n in values):
        raise _DamagedError("no shape of an array")
    return tuple(values)


def _array(leaf: Any) -> np.ndarray:
    if not isinstance(leaf, _Extension) or leaf.code != _ARRAY:
        raise _DamagedError("more than arrays")
    parts, end = _read(leaf.data, 0, iter(range(_MOST_OF_AN_ARRAY)))
    if not isinstance(parts, list) or len(parts) != 3 or end != len(leaf.data):
        raise _DamagedError("no array")
    dims, dtype, data = parts
    dtype = str(dtype, "ascii", "replace") if isinstance(dtype, memoryview) else dtype
    shape = _numbers(dims)
    if dtype not in FLOATS:
        raise _DamagedError(f"an array of {brief(dtype)}")
    kind = np.dtype(dtype)
    if not isinstance(data, memoryview) or len(data) != math.prod(shape) * kind.itemsize:
        raise _DamagedError("an array of another size")
    return np.frombuffer(data, kind).reshape(shape)


def _read(data: memoryview, start: int, left: Iterator[int], depth: int = 0) -> tuple[Any, int]:
    """Reads the object at an offset; returns it and where it ends. Bytes are views of `data`.

    Every object that is read takes one from `left`.
    """
    if depth > _DEEPEST:
        raise _DamagedError("too deep")
    if next(left, None) is None:
        raise _DamagedError("more objects than any model has")
    kind, start = _take(data, start, 1)
    code = kind[0]
    if code <= 0x7F or code >= 0xE0:
        return code if code <= 0x7F else code - 0x100, start
    if code in _CONSTANTS:
        return _CONSTANTS[code], start
    if code in _NUMBERS:
        size, signed = _NUMBERS[code]
        number, start = _take(data, start, size)
        return int.from_bytes(number, "big", signed=signed), start
    if code in _FIXED_EXTENSIONS:
        return _read_extension(data, start, _FIXED_EXTENSIONS[code])
    sort, size = _sort(code)
    if size < 0:  # a length of its own follows, of so many bytes
        number, start = _take(data, start, -size)
        size = int.from_bytes(number, "big")
    if sort == "bytes":
        return _take(data, start, size)
    if sort == "text":
        text, start = _take(data, start, size)
        return str(text, "utf-8"), start
    if sort == "extension":
        return _read_extension(data, start, size)
    items = []
    for _ in range(size * (2 if sort == "map" else 1)):
        item, start = _read(data, start, left, depth + 1)
        items.append(item)
    if sort == "list":
        return items, start
    if not all(isinstance(name, str) for name in items[::2]):
        raise _DamagedError("a name that is no text")
    return dict(zip(items[::2], items[1::2], strict=True)), start


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {0xCC + i: (1 << i, False) for i in range(4)} | {
    0xD0 + i: (1 << i, True) for i in range(4)
}
_FIXED_EXTENSIONS = {0xD4 + i: 1 << i for i in range(5)}
_SIZED = {
    **{0xC4 + i: ("bytes", -(1 << i)) for i in range(3)},
    **{0xC7 + i: ("extension", -(1 << i)) for i in range(3)},
    **{0xD9 + i: ("text", -(1 << i)) for i in range(3)},
    **{0xDC + i: ("list", -(2 << i)) for i in range(2)},
    **{0xDE + i: ("map", -(2 << i)) for i in range(2)},
}


def _sort(code: int) -> tuple[str, int]:
    """Returns what begins with this byte, and its size, or minus the bytes of its size."""
    if code <= 0x8F:
        return "map", code & 0x0F
    if code <= 0x9F:
        return "list", code & 0x0F
    if code <= 0xBF:
        return "text", code & 0x1F
    if code not in _SIZED:
        raise _DamagedError(f"an unknown object {code:#x}")
    return _SIZED[code]


def _read_extension(data: memoryview, start: int, size: int) -> tuple[_Extension, int]:
    code, start = _take(data, start, 1)
    body, start = _take(data, start, size)
    return _Extension(code[0], body), start


def _take(data: memoryview, start: int, size: int) -> tuple[memoryview, int]:
    if start + size > len(data):
        raise _DamagedError("it ends too soon")
    return data[start : start + size], start + size
