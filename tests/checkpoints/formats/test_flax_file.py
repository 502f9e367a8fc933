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
