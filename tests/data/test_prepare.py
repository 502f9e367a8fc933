"""data/{sources,prepare}.py: documents from files, data sets on disk."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neo_jax.data import tokenizing
from neo_jax.data.prepare import prepare
from neo_jax.data.sources import TextFile, find_sources
from neo_jax.data.tokenizer_training import train_byte_pairs, train_sentencepiece
from neo_jax.errors import NeoError
from neo_jax.files import compression
from neo_jax.text.tokenizer import load_tokenizer

TEXTS = [
    "The quick brown fox\njumps over the lazy dog.\n\nCafé, naïve, 日本.",
    "Call me Ishmael. Some years ago -- never mind how long precisely",
    " one two  three\n",
    "numbers 1234567890",
]


class Bytes:
    """Ids are UTF-8 bytes, and 256 the end of a text."""

    vocab_size, eos_id = 257, 256

    def encode(self, text):
        return list(text.encode())

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def save(self, folder):
        pass


def json_lines(texts):
    return "".join(json.dumps({"text": text, "meta": {}}) + "\n" for text in texts).encode()


def documents(paths, text_field="text"):
    """Yields the documents of every source."""
    for source in find_sources(paths, text_field):
        for document in source.documents():
            yield document.text if isinstance(document, TextFile) else document


def refused(paths):
    with pytest.raises(NeoError) as error:
        list(documents(paths))
    assert "\n" not in str(error.value)
    return str(error.value)


def load(folder, split="train"):
    """Returns the documents of a split, as lists of ids."""
    fields = json.loads((folder / "dataset.json").read_text())
    ids = np.fromfile(folder / split / "tokens.bin", np.dtype(fields["dtype"]))
    offsets = np.load(folder / split / "offsets.npy")
    assert (offsets.dtype, offsets[0], offsets[-1]) == (np.int64, 0, len(ids))
    return [ids[start:end].tolist() for start, end in itertools.pairwise(offsets)]


def test_every_ending_is_read(tmp_path):
    for name, opener in (
        ("", open), (".bz2", bz2.open), (".gz", gzip.open), (".xz", lzma.open),
        (".zst", zstandard.open),
    ):  # fmt: skip
        with opener(tmp_path / f"a.txt{name}", "wb") as file:
            file.write(TEXTS[0].encode())
        with opener(tmp_path / f"b.jsonl{name}", "wb") as file:
            file.write(json_lines(TEXTS[1:]))
        assert list(documents([tmp_path / f"a.txt{name}"])) == TEXTS[:1]
        assert list(documents([tmp_path / f"b.jsonl{name}"])) == TEXTS[1:]


def test_folders_and_globs_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/.hidden.txt", ".git/d.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents([tmp_path])) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(documents([f"{tmp_path}/*.txt"])) == ["a.txt", "b.txt"]
    assert list(documents([f"{tmp_path}/**/*.txt"])) == ["a.txt", "b.txt", "sub/c.txt"]
    assert list(documents([tmp_path / "b.txt", str(tmp_path / "a.txt")])) == ["b.txt", "a.txt"]
    (tmp_path / "odd[1].txt").write_text("a file before a glob")
    assert list(documents([tmp_path / "odd[1].txt"])) == ["a file before a glob"]


def test_text_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028three\n".encode())
    assert list(documents([tmp_path])) == ["one\ntwo\u2028three\n"]
    (tmp_path / "a.txt").unlink()
    data = '{"text": "a\u2028b"}\n\n  \n{"text": ""}\r\n{"text": "no newline"}'
    (tmp_path / "b.jsonl").write_bytes(data.encode())
    assert list(documents([tmp_path])) == ["a\u2028b", "", "no newline"]


def test_inputs_that_match_nothing(tmp_path):
    assert "no input is named" in refused([])
    assert "nowhere.txt does not exist." in refused([tmp_path / "nowhere.txt"])
    assert "nothing matches" in refused([f"{tmp_path}/*.txt"])
    assert "holds no file that ends in .txt, .jsonl" in refused([tmp_path])
    (tmp_path / "sub").mkdir()
    assert "no file that" in refused([f"{tmp_path}/*"]) or "holds no file" in refused([tmp_path])
    (tmp_path / "a.pdf").write_text("")
    assert "a.pdf: unknown ending; known are .txt" in refused([tmp_path / "a.pdf"])
    # Reported before the first document is read.
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(NeoError, match="does not exist"):
        next(documents([tmp_path / "a.txt", tmp_path / "b.txt"]))


def test_what_is_not_utf8_is_named_by_its_byte(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt is not UTF-8: byte 3 is 0xe9" in refused([tmp_path])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfcaf\xe9")
    assert "byte 6 is 0xe9" in refused([tmp_path])
    (tmp_path / "a.txt").unlink()
    first = json_lines(["é"])
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(first + b'{"text": "\xff"}')
    assert f"not UTF-8: byte {len(first) + 10} once decompressed is 0xff" in refused([tmp_path])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a', "b.jsonl:2: not valid JSON"),
        ('{"txt": "a"}', 'b.jsonl:2: no "text"'),
        ('{"text": null}', 'b.jsonl:2: no "text"'),
        ('["text"]', "b.jsonl:2: a list, not a JSON object"),
        ('{"text": ' + "[" * 200_000, "b.jsonl:2: lists or objects nested too deeply"),
        ('{"meta": ' + "1" * 5000 + "}", "b.jsonl:2: not valid JSON"),
        ('{"text": "\\ud800"}', 'b.jsonl:2: "text" holds the lone surrogate'),
        (
            '{"prompt": "a"}',
            'b.jsonl:2: no "completion"; every line is an object such as {"prompt"',
        ),
        ('{"prompt": 1, "completion": "a"}', 'b.jsonl:2: no "prompt"'),
        ('{"prompt": "a", "completion": ""}', 'b.jsonl:2: the "completion" is empty; write one'),
        ('{"prompt": "a", "completion": "\\ud800"}', '2: "completion" holds the lone surrogate'),
    ],
)
def test_bad_lines_are_named(tmp_path, line, message):
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    assert message in refused([tmp_path])


PACKERS = {
    ".bz2": bz2.compress,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,  # as the program zstd
}


@pytest.mark.parametrize("ending", PACKERS)
def test_damaged_files_are_named(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    whole = PACKERS[ending](os.urandom(1000))
    path.write_bytes(whole[:500])
    assert f"a.txt{ending} is damaged" in refused([path])
    path.write_bytes(b"not compressed at all")
    assert f"a.txt{ending} is damaged" in refused([path])
    path.write_bytes(whole[:100] + bytes(100) + whole[200:])
    assert f"a.txt{ending} " in refused([path])


@pytest.mark.parametrize("ending", PACKERS)
def test_damage_in_the_middle_is_an_error_there(tmp_path, ending):
    lines = [json_lines([f"{i} {os.urandom(30).hex()}"]) for i in range(4_000)]
    packed = PACKERS[ending](b"".join(lines))
    path = tmp_path / f"a.jsonl{ending}"
    half = len(packed) // 2
    path.write_bytes(packed[:half] + os.urandom(50) + packed[half + 50 :])
    refused([path])
    path.write_bytes(packed[:half])
    assert f"a.jsonl{ending} is damaged (" in refused([path])
    assert "ends" in refused([path])


@pytest.mark.parametrize("ending", PACKERS)
def test_every_stream_of_a_file_is_read_or_refused(tmp_path, ending):
    """One behind the other, with padding between; whatever else stands there is no end."""
    path, pack = tmp_path / f"a.jsonl{ending}", PACKERS[ending]
    one, two = (pack(json_lines(TEXTS[i::2])) for i in (0, 1))
    padding = bytes(8)
    both = TEXTS[::2] + TEXTS[1::2]
    for whole in (one + two, one + padding + two + padding, one + pack(b"") + two):
        path.write_bytes(whole)
        assert list(documents([path])) == both
    for wrong in (b"?" + two[1:], two[1:], two[:-1], two[:1], b"garbage", padding + b"\1", b"\n"):
        path.write_bytes(one + wrong)
        assert f"a.jsonl{ending} is damaged (" in refused([path]), wrong
    for nothing in (b"", padding):
        path.write_bytes(nothing)
        assert f"a.jsonl{ending} is damaged (" in refused([path])


@pytest.mark.parametrize("ending", PACKERS)
def test_what_is_packed_tightly_is_unpacked_in_pieces(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(PACKERS[ending](bytes(50_000_000)))
    tracemalloc.start()
    with compression.open_unpacked(path) as file:
        assert file.read(1) == b"\0"
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 1e5
    assert peak < 20e6


@given(st.lists(st.binary(max_size=40_000), max_size=5), st.integers(1, 70_000))
def test_every_frame_of_a_zst_file_is_read(frames, size):
    """Frames with and without their size, frames of nothing, and frames that are to be skipped."""
    packer = zstandard.ZstdCompressor(write_content_size=False)
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    packed = b"".join(packer.compress(8 * frame) + skipped for frame in frames)
    packed += zstandard.compress(b"end")
    file = compression.UNPACKERS[".zst"](io.BytesIO(packed))
    read = b"".join(iter(lambda: file.read(size), b""))
    assert read == b"".join(8 * frame for frame in frames) + b"end"


def test_windows_as_wide_as_the_piles(tmp_path):
    wide = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    packed = zstandard.ZstdCompressor(compression_params=wide).compressobj()
    data = packed.compress(json_lines(TEXTS)) + packed.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert list(documents([tmp_path])) == TEXTS


def test_the_text_may_have_another_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one", "text": "other"}\n')
    assert list(documents([tmp_path], "content")) == ["one"]
    with pytest.raises(NeoError, match=r'a.jsonl:1: no "body"; every line .* {"body": "..."}'):
        list(documents([tmp_path], "body"))


def test_a_data_set_holds_its_documents(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json_lines([*TEXTS, ""]))
    result = prepare([tmp_path / "in.jsonl"], tmp_path / "out", Bytes())
    ids = [[*text.encode(), 256] for text in TEXTS]
    assert load(tmp_path / "out") == ids
    num_bytes, num_tokens = (sum(map(len, TEXTS_IN_BYTES)), sum(map(len, ids)))
    assert result == {
        "version": 1,
        "dtype": "uint16",
        "vocab_size": 257,
        "eos_id": 256,
        "pairs": False,
        "splits": {
            "train": {
                "documents": 4,
                "bytes": num_bytes,
                "tokens": num_tokens,
                "tokens_per_byte": round(num_tokens / num_bytes, 6),
                "lengths": {
                    "median": 19,
                    "mean": 42.5,
                    "longest": 69,
                    "histogram": [0, 0, 0, 0, 2, 0, 2],
                },
            }
        },
    }
    assert json.loads((tmp_path / "out" / "dataset.json").read_text()) == result
    assert sorted(os.listdir(tmp_path / "out")) == ["dataset.json", "train"]


TEXTS_IN_BYTES = [text.encode() for text in TEXTS]


PAIRS = [("How are you?", " Fine."), ("", "Unasked"), ("naïve", " café")]


def pair_lines(pairs):
    lines = (json.dumps({"prompt": prompt, "completion": text}) + "\n" for prompt, text in pairs)
    return "".join(lines).encode()


def test_pairs_of_prompt_and_completion(tmp_path):
    with lzma.open(tmp_path / "in.jsonl.xz", "wb") as file:
        file.write(pair_lines(PAIRS))
    result = prepare([tmp_path], tmp_path / "out", Bytes())
    assert result["pairs"]
    assert load(tmp_path / "out") == [[*(a + b).encode(), 256] for a, b in PAIRS]
    prompts = np.load(tmp_path / "out" / "train" / "prompts.npy")
    assert (prompts.dtype, prompts.tolist()) == (np.int64, [12, 0, 6])
    size = sum(len((a + b).encode()) for a, b in PAIRS)
    statistics = result["splits"]["train"]
    assert (statistics["documents"], statistics["bytes"]) == (3, size)
    assert statistics["tokens"] == size + 3


def test_a_prompt_has_the_ids_that_it_has_alone(tmp_path, tokenizer_folders):
    (tmp_path / "in.jsonl").write_bytes(pair_lines([("the lazy do", "g, and the dog")]))
    prepare([tmp_path], tmp_path / "out", tokenizer_folders["bytes"])
    tokenizer = load_tokenizer(tokenizer_folders["bytes"])
    prompt, completion = tokenizer.encode_batch(["the lazy do", "g, and the dog"])
    assert load(tmp_path / "out") == [[*prompt, *completion, tokenizer.eos_id]]
    assert np.load(tmp_path / "out" / "train" / "prompts.npy").tolist() == [len(prompt)]
    assert tokenizer.encode("the lazy dog, and the dog") != [*prompt, *completion]


def test_pairs_are_held_out_and_learned_from_as_text(tmp_path):
    """Where a prompt ends changes neither the split nor the tokenizer."""
    texts = [f"question {i}: answer {i}" for i in range(60)]
    results = []
    for cut in (3, 9):
        (tmp_path / "in.jsonl").write_bytes(pair_lines([(t[:cut], t[cut:]) for t in texts]))
        options = {"train_tokenizer": 280, "tokenizer_kind": "bpe", "held_out": 0.3}
        out = tmp_path / f"out-{cut}"
        prepare([tmp_path / "in.jsonl"], out, **options)
        tokenizer = load_tokenizer(out)
        results.append([tokenizer.decode(ids) for ids in load(out, "held_out")])
        prompts = np.load(out / "held_out" / "prompts.npy")
        assert len(prompts) == len(results[-1])
    assert results[0] == results[1]
    assert sorted(results[0]) != sorted(texts)


def test_which_documents_are_held_out(tmp_path):
    """A contract with data sets that were made before: the same texts, whatever the version."""
    (tmp_path / "in.jsonl").write_bytes(json_lines(f"document {i}" for i in range(40)))
    prepare([tmp_path / "in.jsonl"], tmp_path / "out", Bytes(), held_out=0.2)
    texts = [Bytes().decode(ids) for ids in load(tmp_path / "out", "held_out")]
    assert texts == [f"document {i}" for i in (0, 3, 6, 16, 17, 18, 20, 24, 26, 34)]
    assert len(load(tmp_path / "out")) == 40 - len(texts)


@pytest.mark.parametrize("first", ["a", "b"])
def test_pairs_and_text_are_prepared_apart(tmp_path, first):
    other = "b" if first == "a" else "a"
    (tmp_path / f"{first}.jsonl").write_bytes(pair_lines(PAIRS))
    (tmp_path / f"{other}.txt").write_text("plain text")
    with pytest.raises(NeoError, match=r"b\.\w+ brings .* together; prepare them apart") as error:
        prepare([tmp_path], tmp_path / "out", Bytes())
    assert "\n" not in str(error.value)
    assert "--data TEXT=0.9,PAIRS=0.1" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_large_vocabularies_take_four_bytes(tmp_path):
    class Large(Bytes):
        vocab_size = 65537

        def encode(self, text):
            return [i + 65280 for i in text.encode()]

    (tmp_path / "in.txt").write_bytes(b"a\xc3\xbf")
    assert prepare([tmp_path], tmp_path / "out", Large())["dtype"] == "uint32"
    assert load(tmp_path / "out") == [[65377, 65475, 65471, 256]]
    Large.vocab_size = 65536
    assert prepare([tmp_path / "in.txt"], tmp_path / "small", Bytes())["dtype"] == "uint16"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab\né", min_size=1, max_size=9), min_size=9, max_size=60), st.randoms())
def test_documents_are_held_out_by_their_text(tmp_path, texts, random):
    """The splits partition the documents, whatever their order; copies stay together."""
    texts += ["always", "to train", "to be", "held out"]  # so that neither split is empty
    splits = []
    for _ in range(2):
        random.shuffle(texts)
        (tmp_path / "in.jsonl").write_bytes(json_lines(texts))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        prepare([tmp_path / "in.jsonl"], tmp_path / "out", Bytes(), held_out=0.4)
        splits.append([sorted(load(tmp_path / "out", split)) for split in ("train", "held_out")])
    assert splits[0] == splits[1]
    train, held_out = splits[0]
    assert sorted(train + held_out) == sorted([*text.encode(), 256] for text in texts)
    assert not {tuple(ids) for ids in train} & {tuple(ids) for ids in held_out}


def test_the_share_held_out_is_about_what_was_asked(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(json_lines(f"document {i}" for i in range(2000)))
    splits = prepare([tmp_path], tmp_path / "out", Bytes(), held_out=0.1)["splits"]
    assert 160 < splits["held_out"]["documents"] < 240
    assert splits["train"]["documents"] + splits["held_out"]["documents"] == 2000


@pytest.mark.parametrize(
    ("kind", "trainer"), [("sentencepiece", train_sentencepiece), ("bpe", train_byte_pairs)]
)
def test_a_tokenizer_is_trained_without_what_is_held_out(tmp_path, kind, trainer):
    words = ["alpha beta", "gamma delta", "epsilon zeta", "eta theta", "iota kappa"]
    texts = [f"{words[i % 5]} number {i}" for i in range(60)]
    (tmp_path / "in.jsonl").write_bytes(json_lines(texts))
    options = {"train_tokenizer": 290, "tokenizer_kind": kind}
    prepare([tmp_path], tmp_path / "out", **options, held_out=0.2)
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.vocab_size == 290
    train = [tokenizer.decode(ids) for ids in load(tmp_path / "out")]
    held_out = [tokenizer.decode(ids) for ids in load(tmp_path / "out", "held_out")]
    assert sorted(train + held_out) == sorted(texts)
    alone = trainer(train, 290, tmp_path / "alone")
    assert alone.encode_batch(texts) == tokenizer.encode_batch(texts)


def test_a_tokenizer_is_named_by_its_folder(tmp_path):
    (tmp_path / "in.txt").write_text(TEXTS[0] * 20)
    train_sentencepiece([TEXTS[0], TEXTS[1]], 300, tmp_path / "tokenizer")
    prepare([tmp_path / "in.txt"], tmp_path / "out", tmp_path / "tokenizer")
    # Again, with the tokenizer of the data set.
    again = prepare([tmp_path / "in.txt"], tmp_path / "again", tmp_path / "out")
    tokenizer = load_tokenizer(tmp_path / "again")
    assert load(tmp_path / "again") == [[*tokenizer.encode(TEXTS[0] * 20), tokenizer.eos_id]]
    assert again["splits"]["train"]["tokens"] < again["splits"]["train"]["bytes"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a tokenizer or the size of one to train"),
        ({"tokenizer": Bytes(), "train_tokenizer": 300}, "not both"),
        ({"train_tokenizer": -1}, "-1 pieces cannot be trained"),
        ({"tokenizer": Bytes(), "held_out": 1.0}, "not 1.0"),
        ({"tokenizer": Bytes(), "held_out": -0.1}, "not -0.1"),
        ({"tokenizer": Bytes(), "held_out": 1e-9}, "split 'held_out'; choose a larger share"),
        ({"tokenizer": Bytes(), "held_out": 0.999999}, "split 'train'; choose a smaller share"),
        ({"tokenizer": "nowhere"}, "no folder and no published model .nowhere"),
        ({"train_tokenizer": 9999}, "too small for 9999 pieces"),
        ({"train_tokenizer": 9999, "tokenizer_kind": "bpe"}, "too small for 9999 tokens; ask for"),
        ({"train_tokenizer": 256, "tokenizer_kind": "bpe"}, "256 tokens are too few for bytes"),
    ],
)
def test_errors_leave_nothing_behind(tmp_path, arguments, message):
    (tmp_path / "in.jsonl").write_bytes(json_lines(TEXTS))
    with pytest.raises(NeoError, match=message) as error:
        prepare([tmp_path], tmp_path / "out", **arguments)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_no_text_is_an_error(tmp_path):
    (tmp_path / "in.txt").write_text("")
    (tmp_path / "in.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "blank.jsonl").write_text("\n\n  \n")
    with pytest.raises(NeoError, match="the input holds no text"):
        prepare([tmp_path], tmp_path / "out", Bytes())
    with pytest.raises(NeoError, match="no text to train a tokenizer on"):
        prepare([tmp_path], tmp_path / "out", train_tokenizer=300)


def test_a_tokenizer_needs_an_end_of_text(tmp_path):
    class Endless(Bytes):
        eos_id = None

    (tmp_path / "in.txt").write_text("a")
    with pytest.raises(NeoError, match="has no end-of-text token"):
        prepare([tmp_path], tmp_path / "out", Endless())


def test_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "new"}\n{"text": ')
    with pytest.raises(NeoError, match=r"bad.jsonl:2"):
        prepare([tmp_path / "bad.jsonl"], tmp_path / "out", Bytes())
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_nothing_is_replaced(tmp_path):
    (tmp_path / "in.txt").write_text("old")
    out = tmp_path / "out"
    out.mkdir()
    prepare([tmp_path / "in.txt"], out, Bytes())  # an empty folder is fine
    (tmp_path / "in.txt").write_text("new")
    with pytest.raises(NeoError, match=r"out holds a data set already; choose another output, or"):
        prepare([tmp_path / "in.txt"], out, Bytes())
    assert load(out) == [[*b"old", 256]]
    (out / "dataset.json").rename(out / "notes.txt")
    (out / "tokenizer.json").touch()
    shutil.rmtree(out / "train")
    with pytest.raises(NeoError, match=r"out holds 'notes.txt' already; choose another output"):
        prepare([tmp_path / "in.txt"], out, Bytes())
    with pytest.raises(NeoError, match=r"in.txt is a file; choose another output"):
        prepare([tmp_path / "in.txt"], tmp_path / "in.txt", Bytes())
    with pytest.raises(NeoError, match="cannot write in"):
        prepare([tmp_path / "in.txt"], tmp_path / "in.txt" / "out", Bytes())
    assert sorted(os.listdir(out)) == ["notes.txt", "tokenizer.json"]


def test_batches_are_bounded(tmp_path, monkeypatch):
    sizes = []

    class Watched(Bytes):
        def encode_batch(self, texts):
            sizes.append((len(texts), sum(map(len, texts))))
            return super().encode_batch(texts)

    monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", 100)
    monkeypatch.setattr(tokenizing, "_BATCH_DOCUMENTS", 8)
    texts = [f"{i} " * (i % 20 + 1) for i in range(100)]
    (tmp_path / "in.jsonl").write_bytes(json_lines(texts))
    prepare([tmp_path], tmp_path / "out", Watched())
    assert load(tmp_path / "out") == [[*text.encode(), 256] for text in texts]
    assert all(number <= 8 and size < 200 for number, size in sizes)


def test_progress_is_for_terminals(tmp_path, capsys):
    (tmp_path / "in.txt").write_text(TEXTS[1] * 20)
    prepare([tmp_path], tmp_path / "out", Bytes())
    assert capsys.readouterr() == ("", "")
    prepare([tmp_path / "in.txt"], tmp_path / "shown", Bytes(), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokenizing 1 documents" in err
