"""data/cutting.py: the ids of pieces are those of the undivided text, whatever it holds."""

import gzip
import json
import random
import subprocess
import sys

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from neo_jax.data import text_file, tokenizing
from neo_jax.data.cutting import LINES, divide, exact_cuts
from neo_jax.data.prepare import prepare
from neo_jax.data.tokenizer_training import train_byte_pairs
from neo_jax.errors import NeoError
from neo_jax.text.tokenizer import BytePairTokenizer, load_tokenizer

ADDED = [
    AddedToken("<|endoftext|>", special=True, normalized=False),
    AddedToken("<l>", lstrip=True, normalized=False),
    AddedToken("<r>", rstrip=True, normalized=False),
    AddedToken("dog", single_word=True, normalized=False),
    AddedToken("  ", normalized=True),
    AddedToken("x y", normalized=False),
    AddedToken("\n\n", normalized=False),
    AddedToken("é x", normalized=True),
]
BITS = [
    *" \n\t\r\u00a0\u3000\x1c\u200b", "  ", "\n\n", " \n ", "\r\n", "'s", "'", "'re ", "don't", "a",
    "the dog", "dogs", " x y", "Zoë", "e\u0301 x", "é", "\u0301", "12", "3.14", "²", "日本", "語。",
    "が", "か\u3099", "！", "🙂", "👩‍👩‍👧", "ß", "ǅ", "_", "--", "(", "<|endoftext|>", "<l>", "<r>",
    "<|end", "oftext|>", "\U00031350", "\u0378", "가", "\u1100\u1161",
]  # fmt: skip
bits = st.sampled_from(BITS) | st.sampled_from(BITS) | st.text(max_size=2)
texts = st.lists(bits, min_size=8, max_size=40).map("".join)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Byte-level tokenizers of one vocabulary, in which words of any kind are merged."""
    draw = random.Random(0)
    learned = ["".join(draw.choices(BITS, k=100)) for _ in range(100)]
    learned = train_byte_pairs(learned, 1400, tmp_path_factory.mktemp("learned"))
    kinds = []
    for prefix, normalizer, added in (
        (False, None, []),
        (True, None, []),
        (False, None, ADDED),
        (False, normalizers.NFC(), ADDED),
        (True, normalizers.NFC(), ADDED),
    ):
        pipeline = tokenizers.Tokenizer.from_str(learned.pipeline.to_str())
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        if normalizer:
            pipeline.normalizer = normalizer
        pipeline.add_tokens(added)
        folder = tmp_path_factory.mktemp("kind")
        pipeline.save(str(folder / "tokenizer.json"))
        kinds.append(BytePairTokenizer(folder))
    return kinds


@settings(max_examples=150)
@example("xx<r> what its rstrip takes", 1, 2)
@given(texts, st.integers(1, 9), st.integers(0, 4))
def test_pieces_have_the_ids_of_the_undivided_text(kinds, text, size, kind):
    tokenizer = kinds[kind]
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    pieces = list(divide(parts, exact_cuts(tokenizer)))
    assert "".join(pieces) == text
    assert "" not in pieces
    ids = [i for piece in tokenizer.encode_batch(pieces) for i in piece]
    assert ids == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["word " * 300, "日本の夏。" * 300, "a1b2-" * 300, "\nline" * 300])
def test_pieces_are_about_as_long_as_parts(kinds, text):
    parts = [text[start : start + 50] for start in range(0, len(text), 50)]
    cut = list(divide(parts, exact_cuts(kinds[0])))
    assert max(map(len, cut)) <= 80
    assert len(cut) > len(text) // 80


def test_other_tokenizers_are_not_cut(tmp_path, tokenizer_folders):
    assert exact_cuts(load_tokenizer(tokenizer_folders["pieces"])) is None
    pipeline = tokenizers.Tokenizer.from_file(str(tokenizer_folders["bytes"] / "tokenizer.json"))
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Sequence([pre_tokenizers.Digits(), whole])
    for words, normalizer in ((whole, None), (split, None), (None, normalizers.Lowercase())):
        pipeline.pre_tokenizer = words or pre_tokenizers.ByteLevel(add_prefix_space=False)
        if normalizer:
            pipeline.normalizer = normalizer
        pipeline.save(str(tmp_path / "tokenizer.json"))
        assert exact_cuts(BytePairTokenizer(tmp_path)) is None


@given(texts, st.integers(1, 9))
def test_lines_are_whole(text, size):
    """What learns a tokenizer sees the same lines, and byte pairs the same words."""
    pieces = list(divide([text[i : i + size] for i in range(0, len(text), size)], LINES))
    assert "".join(pieces) == text
    lines = [line for piece in pieces for line in piece.split("\n") if line]
    assert lines == [line for line in text.split("\n") if line]
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    assert [w for piece in pieces for w, _ in words(piece)] == [w for w, _ in words(text)]


TEXT = "The quick brown fox\n jumps over 12 lazy dogs, naïvely: 日本。\n\n" * 40


@pytest.fixture
def long_documents(tmp_path):
    """Six files of some thousand characters: three of text, and three of a JSON line."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("a.txt", "b.txt", "c.txt.gz", "d.jsonl", "e.jsonl", "f.jsonl")):
        text = f"{i} {TEXT}"
        data = (text if ".txt" in name else json.dumps({"text": text})).encode()
        (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_long_documents_are_written_in_pieces(
    tmp_path, monkeypatch, tokenizer_folders, long_documents, held_out
):
    """To the same files, in the same split."""
    results = []
    for part, batch in ((1 << 16, 1 << 20), (100, 250)):
        monkeypatch.setattr(text_file, "PART", part)
        monkeypatch.setattr(tokenizing, "_BATCH_CHARACTERS", batch)
        out = tmp_path / f"out{part}"
        sizes = watched(monkeypatch)
        fields = prepare([long_documents], out, tokenizer_folders["bytes"], held_out=held_out)
        results.append((fields, {path.name: path.read_bytes() for path in out.rglob("*.*")}))
        assert max(sizes) > len(TEXT) if part > 100 else max(sizes) < 200
    assert results[0] == results[1]
    counts = {name: each["documents"] for name, each in results[0][0]["splits"].items()}
    assert counts == ({"train": 3, "held_out": 3} if held_out else {"train": 6})


def watched(monkeypatch):
    """A list that grows by the length of each text that is encoded."""
    sizes, encode = [], BytePairTokenizer.encode_batch

    def batch(tokenizer, texts):
        sizes.extend(map(len, texts))
        return encode(tokenizer, texts)

    monkeypatch.setattr(BytePairTokenizer, "encode_batch", batch)
    return sizes


def test_long_pairs_are_written_in_pieces(tmp_path, monkeypatch, tokenizer_folders):
    line = json.dumps({"prompt": TEXT[:1000], "completion": TEXT[1000:]})
    (tmp_path / "in.jsonl").write_text(line + "\n" + line.replace(TEXT[:30], "", 1))
    results = []
    for part in (1 << 16, 100):
        monkeypatch.setattr(text_file, "PART", part)
        out = tmp_path / f"out{part}"
        fields = prepare([tmp_path / "in.jsonl"], out, tokenizer_folders["bytes"])
        results.append((fields, {path.name: path.read_bytes() for path in out.rglob("*.*")}))
    assert results[0] == results[1]


def test_what_is_tokenized_whole_is_reported_once(
    tmp_path, monkeypatch, capsys, tokenizer_folders, long_documents
):
    prepare([long_documents], tmp_path / "short", tokenizer_folders["pieces"])
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(text_file, "PART", 100)
    prepare([long_documents], tmp_path / "out", tokenizer_folders["pieces"])
    err = capsys.readouterr().err
    assert err.count("\n") == err.count("are tokenized whole, and take memory by their length") == 1
    for name in ("tokens.bin", "offsets.npy"):
        data = [(tmp_path / out / "train" / name).read_bytes() for out in ("short", "out")]
        assert data[0] == data[1]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_tokenizer_learns_the_same_of_pieces(tmp_path, monkeypatch, long_documents, kind):
    results = []
    for part in (1 << 16, 100):
        monkeypatch.setattr(text_file, "PART", part)
        out = tmp_path / f"out{part}"
        options = {"train_tokenizer": 297, "tokenizer_kind": kind, "held_out": 0.5}
        prepare([long_documents], out, progress=False, **options)
        results.append({path.name: path.read_bytes() for path in out.rglob("*.*")})
    assert results[0] == results[1]


def test_text_is_decoded_in_parts(tmp_path, monkeypatch):
    """Characters, the mark at the beginning and bytes that are none, wherever a part ends."""
    path = tmp_path / "a.txt"
    for size in range(1, 12):
        monkeypatch.setattr(text_file, "PART", size)
        for text in ("", "\ufeff", "\ufeff\ufeffaß日🙂\ufeff\r\n", "日本語"):
            path.write_bytes(text.encode())
            parts = list(text_file.TextFile(path).parts())
            assert "".join(parts) == text.removeprefix("\ufeff").replace("\r\n", "\n")
            assert all(0 < len(part) <= size for part in parts)
        for data, place in (
            (b"ab\xff", 2),
            ("日".encode() + b"\xe6\x97", 3),
            (b"\xef\xbb\xbfa\xe9b", 4),
        ):
            path.write_bytes(data)
            with pytest.raises(NeoError, match=f"not UTF-8: byte {place} is 0x{data[place]:02x};"):
                list(text_file.TextFile(path).parts())


MEMORY = """
import resource, sys
from neo_jax.data.prepare import prepare
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large, tokenizer, out = sys.argv[1:]
prepare([small], out + "-small", tokenizer)
before = peak()
prepare([large], out, tokenizer)
print(peak() - before)
"""


def test_memory_does_not_grow_with_a_document(tmp_path, tokenizer_folders):
    """Of 3 MB: they took 400 MB once, where all sizes now take what a batch does."""
    text = TEXT.encode()
    (tmp_path / "small.txt").write_bytes(text)
    (tmp_path / "large.txt.gz").write_bytes(gzip.compress(text * (3_000_000 // len(text)), 1))
    paths = [tmp_path / "small.txt", tmp_path / "large.txt.gz", tokenizer_folders["bytes"]]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 200
