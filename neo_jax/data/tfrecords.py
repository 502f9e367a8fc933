"""Token ids from TFRecords, as gpt-neo and mesh-transformer-jax wrote them, without TensorFlow.

A file is a sequence of records: the length of the data (uint64), a checksum of the length (uint32),
the data, a checksum of the data (uint32); all little-endian. The data is a `tf.train.Example`, a
protocol buffer:

Example { features = 1: Features { feature = 1: map<string key = 1, Feature value = 2> } }
Feature { int64_list = 3: Int64List { repeated int64 value = 1 } }
"""

import functools
import itertools
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

from neo_jax.errors import NeoError


class Record(NamedTuple):
    """The ids of a record."""

    ids: np.ndarray  # int64 [n]
    where: str  # to name it in errors
    is_document: bool  # else a piece of a stream, in which the ends of text stand already


def read_records(file: IO[bytes], name: str, feature: str) -> Iterator[Record]:
    """Yields the records of a file in order.

    Both repositories join documents by ends of text and cut the stream into records of one length;
    gpt-neo can also write a document a record, without an end of text. So a file whose first eight
    records are of one length (but for the last of the file, which may be shorter) holds pieces of
    a stream, any other documents.

    Args:
      file: what to read, decompressed.
      name: of the file, for errors.
      feature: the name of the feature that holds the ids, as int64.

    Raises:
      NeoError: a record is damaged, or has no such feature.
    """
    records = _numbered(file, name, feature)
    first = list(itertools.islice(records, 8))
    lengths = [len(ids) for ids, _ in first]
    pieces = len(set(lengths[:-1])) <= 1 and lengths[-1:] <= lengths[:1]
    for ids, where in itertools.chain(first, records):
        yield Record(ids, where, is_document=not pieces)


def _numbered(file: IO[bytes], name: str, feature: str) -> Iterator[tuple[np.ndarray, str]]:
    for number in itertools.count(1):
        where = f"{name}: record {number}"
        try:
            data = _next_record(file)
            if data is None:
                return
            ids = _int64_feature(data, feature.encode())
        except _DamageError as error:
            raise NeoError(
                f"{where} is damaged ({error}); is this a TFRecord file, and whole? If it was "
                "written with compression, name it .gz."
            ) from error
        if ids is None:
            raise NeoError(f"{where} has no int64 feature '{feature}'; name another --text-field.")
        yield ids, where


class _DamageError(Exception):
    """What is wrong with the bytes of a record."""


def _next_record(file: IO[bytes]) -> bytes | None:
    head = file.read(12)
    if not head:
        return None
    _check(head[:8], head[8:])
    size = int.from_bytes(head[:8], "little")
    if size > _MOST_BYTES:
        raise _DamageError(f"it claims {size:,} bytes, and an Example has at most {_MOST_BYTES:,}")
    data = b"".join(_blocks(file, size))
    _check(data, file.read(4))
    return data


_MOST_BYTES = 2**31 - 1  # of a protocol buffer
_READ_BYTES = 1 << 20


def _blocks(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yields what a file has of the next `size` bytes: memory grows with them, not with a claim."""
    while size and (block := file.read(min(size, _READ_BYTES))):
        size -= len(block)
        yield block


def _check(data: bytes, checksum: bytes) -> None:
    crc = crc32c(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(checksum) < 4:
        raise _DamageError("the file ends within it")
    if masked.to_bytes(4, "little") != checksum:
        raise _DamageError("its checksum is another")


_BLOCK = 1024


def crc32c(data: bytes) -> int:
    """Returns the CRC-32C (Castagnoli) of bytes, a block of them at a time."""
    # Row k holds what a byte contributes when k more bytes of its block follow.
    table = _crc_table()
    crc = 0xFFFFFFFF
    for start in range(0, len(data), _BLOCK):
        block = np.frombuffer(data[start : start + _BLOCK], np.uint8).astype(np.intp)
        head = block[:4]
        head ^= np.frombuffer(crc.to_bytes(4, "little"), np.uint8)[: len(head)]
        rows = np.arange(len(block) - 1, -1, -1) << 8
        crc = crc >> 8 * len(head) ^ int(
            np.bitwise_xor.reduce(table[rows + block], keepdims=True)[0]
        )
    return crc ^ 0xFFFFFFFF


@functools.cache
def _crc_table() -> np.ndarray:
    """Returns uint32 [_BLOCK * 256]."""
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, row >> 1 ^ np.uint32(0x82F63B78), row >> 1)
    rows = [row]
    for _ in range(_BLOCK - 1):
        rows.append(rows[-1] >> 8 ^ row[rows[-1] & 0xFF])
    return np.concatenate(rows)


_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}  # wire types of a fixed number of bytes


def _int64_feature(data: bytes, name: bytes) -> np.ndarray | None:
    """Returns the ids of a feature of an Example, int64 [n]; None where there is no such list."""
    found = None
    for features in _messages(data, 1):
        for entry in _messages(features, 1):
            if next(_messages(entry, 1), b"") == name:
                lists = [ids for value in _messages(entry, 2) for ids in _messages(value, 3)]
                found = _int64_list(b"".join(lists)) if lists else None
    return found


def _messages(data: bytes, number: int) -> Iterator[bytes]:
    """Yields the bytes of every field of this number."""
    return (value for key, value in _fields(data) if key == number and isinstance(value, bytes))


def _int64_list(data: bytes) -> np.ndarray:
    """Returns the numbers of an Int64List, whose runs are packed, or each one a field."""
    parts = [
        _varints(value) if isinstance(value, bytes) else np.array([value], np.uint64)
        for key, value in _fields(data)
        if key == 1
    ]
    return np.concatenate([np.empty(0, np.uint64), *parts]).view(np.int64)


def _varints(data: bytes) -> np.ndarray:
    """Returns numbers that are written seven bits a byte, lowest first; uint64 [n]."""
    digits = np.frombuffer(data, np.uint8)
    last = digits < 0x80
    if not digits.size:
        return np.empty(0, np.uint64)
    if not last[-1]:
        raise _DamageError("a number has no end")
    starts = np.concatenate([[0], np.flatnonzero(last)[:-1] + 1])
    lengths = np.diff(starts, append=len(digits))
    if lengths.max() > 10:
        raise _DamageError("a number is too long")
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    values = (digits & 0x7F).astype(np.uint64) << (7 * places).astype(np.uint64)
    return np.bitwise_or.reduceat(values, starts)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields the number and the value of every field of a message; of fixed size ones the bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in _FIXED:
            size = _FIXED[wire]
        else:
            raise _DamageError(f"wire type {wire} is none")
        if position + size > len(data):
            raise _DamageError("a field is longer than its message")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Returns the number that begins at a position, and the position behind it."""
    value = shift = 0
    while position < len(data) and shift < 70:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
        shift += 7
    raise _DamageError("a number has no end")
