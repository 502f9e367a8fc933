"""checkpoints/formats/flax_file.py: files that flax would not have written; others are read in
tests/cli/test_convert_checkpoint.py."""

import contextlib
import struct
import tracemalloc

import msgpack
import numpy as np
import pytest

from neo_jax.checkpoints.formats.flax_file import open_file
from neo_jax.errors import NeoError


def refusal(path):
    with pytest.raises(NeoError) as error, contextlib.ExitStack() as files:
        open_file(path, files)
    return str(error.value)


def array(shape, data, dtype="float32"):
    return msgpack.ExtType(1, msgpack.packb((shape, dtype, data), use_bin_type=True))


MILLION = struct.pack(">I", 1_000_000)


@pytest.mark.parametrize(
    "content",
    [
        b"\xdd" + MILLION + b"\x80" * 1_000_000,
        b"\xdd" + MILLION + b"\xc4\x00" * 1_000_000,
        b"\xdd" + MILLION + b"\xd4\x01\x00" * 1_000_000,
        b"\x82" + b"\xa1a\xdd" + MILLION + b"\x90" * 1_000_000 + b"\xa1b\x80",
    ],
    ids=["maps", "bytes", "extensions", "lists"],
)
def test_small_objects_do_not_fill_the_memory(tmp_path, monkeypatch, content):
    monkeypatch.setattr("neo_jax.checkpoints.formats.flax_file._MOST_OBJECTS", 10_000)
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    tracemalloc.start()
    assert "more objects than any model has" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_an_array_holds_no_objects(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    inner = b"\xdd" + MILLION + b"\x80" * 1_000_000
    path.write_bytes(msgpack.packb({"a": msgpack.ExtType(1, inner)}))
    tracemalloc.start()
    assert "more objects than any model has" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("level", [b"\x91", b"\x81\xa1a", b"\xdd\0\0\0\1"])
def test_objects_in_objects_do_not_fill_the_stack(tmp_path, level):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(level * 100_000 + b"\x80")
    assert "damaged or cut short (too deep)" in refusal(path)


def test_every_byte_counts(tmp_path):
    """What is cut short anywhere is refused, and so is what goes on."""
    path = tmp_path / "flax_model.msgpack"
    whole = msgpack.packb({"params": {"a": array([2], b"\0" * 8), "b": array([0], b"")}})
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert "damaged or cut short" in refusal(path)
    path.write_bytes(whole + b"\x80")
    assert "bytes follow its end" in refusal(path)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([array([2], b"\0" * 8), array([1, 1], b"\0" * 4)], "a has parts of several kinds"),
        ([array([2], b"\0" * 8), array([1], b"\0" * 2, "float16")], "a has parts of several kinds"),
        ([array([2], b"\0" * 8)], "a lacks parts"),
        ([], "a has parts of several kinds"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, chunks, message):
    parts = {str(i): chunk for i, chunk in enumerate(chunks)}
    tree = {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": parts}}
    (tmp_path / "a.msgpack").write_bytes(msgpack.packb(tree))
    assert message in refusal(tmp_path / "a.msgpack")


def test_parts_that_fit(tmp_path):
    parts = {"0": array([2], b"\0\0\x80\x3f" * 2), "1": array([1], b"\0" * 4)}
    tree = {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 3}, "chunks": parts}}
    (tmp_path / "a.msgpack").write_bytes(msgpack.packb(tree))
    with contextlib.ExitStack() as files:
        np.testing.assert_array_equal(
            open_file(tmp_path / "a.msgpack", files)["a"].view(), np.array([1, 1, 0], np.float32)
        )
