"""Token ids from TFRecords, as gpt-neo and mesh-transformer-jax wrote them, without TensorFlow.

A file is a sequence of records: the length of the data (uint64), a checksum of the length (uint32),
the data, a checksum of the data (uint32); all little-endian. The data is a `tf.train.Example`, a
protocol buffer.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np

from neo_jax.errors import NeoError

# The fields of `tf.train.Example` that are read: its map of features is a list of such entries, and
# bytes may be any where a text must be UTF-8.
_EXAMPLE = """
name: "neo_jax/example.proto" package: "neo_jax" syntax: "proto3"
message_type { name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "Entry" } }
message_type { name: "Entry"
  field { name: "key" number: 1 type: TYPE_BYTES }
  field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" } }
message_type { name: "Feature"
  field { name: "ids" number: 3 type: TYPE_MESSAGE type_name: "Int64List" } }
message_type { name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
"""


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
    a stream, any other documents. The ids are those of a feature of int64; errors call the file by
    its name.

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
    from google.protobuf.message import DecodeError

    parse = _parser()
    for number in itertools.count(1):
        where = f"{name}: record {number}"
        try:
            data = _next_record(file)
            if data is None:
                return
            entries = parse(data).features.feature
        except (_DamageError, DecodeError) as error:
            what = error if isinstance(error, _DamageError) else "its data is no tf.train.Example"
            raise NeoError(
                f"{where} is damaged ({what}); is this a TFRecord file, and whole? If it was "
                "written with compression, name it .gz."
            ) from error
        found = [entry.value for entry in entries if entry.key == feature.encode()]
        if not found or not found[-1].HasField("ids"):
            raise NeoError(f"{where} has no int64 feature '{feature}'; name another --text-field.")
        yield np.array(found[-1].ids.value, np.int64), where


@functools.cache
def _parser() -> Any:
    """Returns what reads the bytes of an Example."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    file = text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto())
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    found = pool.FindMessageTypeByName("neo_jax.Example")
    return message_factory.GetMessageClass(found).FromString


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
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if len(checksum) < 4:
        raise _DamageError("the file ends within it")
    if masked.to_bytes(4, "little") != checksum:
        raise _DamageError("its checksum is another")
