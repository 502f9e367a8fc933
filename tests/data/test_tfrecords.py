"""data/tfrecords.py: the reader against a writer, and a file that TensorFlow wrote."""

import gzip
import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import checksum, example, field, frame, ids_example, int64_list, tfrecords, varint

from neo_jax.data.prepare import prepare
from neo_jax.data.sources import find_sources
from neo_jax.data.tfrecords import read_records
from neo_jax.errors import NeoError


def read(data, feature="text"):
    return list(read_records(io.BytesIO(data), "a.tfrecords", feature))


def refused(data, feature="text"):
    with pytest.raises(NeoError) as error:
        read(data, feature)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_checksums():
    """CRC-32C of 1 to 9 is 0xE3069283 in every book; TensorFlow's mask rotates it and adds."""
    data = b"123456789"
    masked = (0x2507C60D + 0xA282EAD8).to_bytes(4, "little")
    assert checksum(data) == masked
    assert "record 1 has no int64" in refused(frame(data))  # the checksum is right
    assert "its checksum is another" in refused(frame(data)[:-1] + b"\0")


ids_lists = st.lists(
    st.lists(st.integers(0, 50256) | st.integers(-(2**63), 2**63 - 1), max_size=20), max_size=12
)


@given(ids_lists, st.booleans())
def test_what_is_written_is_read(documents, packed):
    records = read(tfrecords(documents, packed=packed))
    assert [record.ids.tolist() for record in records] == documents
    assert [record.where for record in records] == [
        f"a.tfrecords: record {i + 1}" for i in range(len(documents))
    ]
    assert all(record.ids.dtype == np.int64 for record in records)


@given(st.lists(st.integers(0, 2**40)), st.integers(0, 20), st.binary(max_size=9))
def test_other_features_and_fields_are_passed_over(ids, cut, data):
    """Runs may be split, and fields of any wire type stand between them."""
    unknown = [
        varint(7 << 3) + varint(3),
        varint(7 << 3 | 1) + bytes(8),
        varint(7 << 3 | 5) + bytes(4),
        field(9, data),
    ]
    runs = int64_list(ids[:cut]) + b"".join(unknown) + int64_list(ids[cut:], packed=False)
    features = {
        "a": field(1, field(1, data)),
        "text": b"".join(unknown) + field(3, runs),
        "b": field(2, field(1, bytes(8))),
    }
    (record,) = read(frame(b"".join(unknown) + example(features)))
    assert record.ids.tolist() == ids


@pytest.mark.parametrize(
    ("lengths", "is_document"),
    [
        ([5] * 20, False),
        ([5, 5, 5, 2], False),  # the rest of a stream
        ([5], False),
        ([5] * 8 + [2], False),
        ([5, 4, 5], True),
        ([5, 5, 6], True),
        ([2, 5], True),
    ],
)
def test_pieces_have_one_length_and_documents_many(lengths, is_document):
    records = read(tfrecords([range(1, length + 1) for length in lengths]))
    assert {record.is_document for record in records} == {is_document}


whole = tfrecords([[1, 2, 3], [70000, 5]])


@given(st.integers(1, len(whole) - 1))
def test_files_that_were_cut_short(size):
    boundary = len(tfrecords([[1, 2, 3]]))
    if size != boundary:
        message = refused(whole[:size])
        assert message.startswith(f"a.tfrecords: record {1 + (size > boundary)} is damaged (the fi")


@pytest.mark.parametrize("size", [2**64 - 1, 2**48, 2**31, 2**31 - 1])
def test_lengths_that_the_file_does_not_have(size):
    """Refused before so much memory is taken."""
    length = size.to_bytes(8, "little")
    tracemalloc.start()
    message = refused(whole + length + checksum(length) + b"x")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
    assert message.startswith("a.tfrecords: record 3 is damaged (")
    assert ("ends within it" if size < 2**31 else f"claims {size:,} bytes") in message


@given(st.integers(0, len(whole) - 1), st.integers(1, 255))
def test_no_damaged_byte_is_overlooked(place, change):
    data = bytearray(whole)
    data[place] ^= change
    assert "is damaged (" in refused(bytes(data))


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data):
    try:
        read(frame(data))
    except NeoError as error:
        assert "record 1 " in str(error)  # noqa: PT017


def test_what_is_no_example():
    assert "has no int64 feature 'txt'; name another --text-field" in refused(whole, "txt")
    assert "has no int64 feature 'text'" in refused(frame(example({"text": field(1, b"")})))
    assert "its data is no tf.train.Example" in refused(frame(field(1, b"\xff")))
    assert "its data is no tf.train.Example" in refused(
        frame(example({"text": field(3, field(1, b"\x01\xff"))}))
    )
    assert "its data is no tf.train.Example" in refused(
        frame(example({"text": field(3, field(1, b"\xff" * 10 + b"\x01"))}))
    )
    assert "its data is no tf.train.Example" in refused(frame(b"\x0b"))
    assert "its data is no tf.train.Example" in refused(frame(b"\x0a\x05a"))
    assert "the file ends within it" in refused((8).to_bytes(8, "little") + checksum(bytes(8))[:2])


class Letters:
    """Ids are those of letters in the alphabet, 26 the end of a text."""

    vocab_size, eos_id = 27, 26

    def encode_batch(self, texts):
        return [[ord(letter) - 97 for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids if i < 26)

    def save(self, folder):
        pass


def tokens(folder, split="train"):
    return np.fromfile(folder / split / "tokens.bin", "<u2").tolist()


def test_pieces_become_the_stream_they_were_cut_from(tmp_path):
    stream = [0, 1, 26, 2, 3, 4, 5, 6, 26, 7]
    (tmp_path / "a.tfrecords").write_bytes(tfrecords([stream[:4], stream[4:8], stream[8:]]))
    fields = prepare([tmp_path], tmp_path / "out", Letters())
    assert tokens(tmp_path / "out") == stream
    numbers = fields["splits"]["train"]
    assert (numbers["documents"], numbers["bytes"], numbers["tokens"]) == (3, 8, 10)


def test_documents_are_as_those_of_text(tmp_path):
    texts = ["abc", "d", "ef", "ghijk"]
    ids = Letters().encode_batch(texts)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    (tmp_path / "ids.tfrecord.gz").write_bytes(gzip.compress(tfrecords([*ids, []])))
    (tmp_path / "ended.tfrecord").write_bytes(tfrecords([[*line, 26] for line in ids]))
    results = []
    for name in ("text.jsonl", "ids.tfrecord.gz", "ended.tfrecord"):
        out = tmp_path / f"{name}.out"
        results.append(prepare([tmp_path / name], out, Letters(), held_out=0.4))
        assert tokens(out) == tokens(tmp_path / "text.jsonl.out")
        assert tokens(out, "held_out") == tokens(tmp_path / "text.jsonl.out", "held_out")
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("wrong", [27, -1, 2**40])
def test_ids_beyond_the_vocabulary(tmp_path, wrong):
    (tmp_path / "a.tfrecords").write_bytes(tfrecords([[1], [2, wrong]], name="ids"))
    with pytest.raises(NeoError, match=rf"a.tfrecords: record 2 holds the id {wrong}, which is no"):
        prepare([tmp_path], tmp_path / "out", Letters(), text_field="ids")


def test_ids_train_no_tokenizer(tmp_path):
    (tmp_path / "a.tfrecords").write_bytes(whole)
    with pytest.raises(NeoError, match="record 1 holds token ids; give the tokenizer that made"):
        prepare([tmp_path], tmp_path / "out", train_tokenizer=300)
    assert len(list(find_sources([tmp_path])[0].documents())) == 2


def test_a_record_is_an_example():
    """The bytes of tf.train.Example, as its documentation shows them for another feature."""
    assert ids_example([1, 300]).hex() == "0a110a0f0a047465787412071a050a0301ac02"
