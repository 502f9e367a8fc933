"""data/text_file.py: the documents of files of text, in pieces, with line feeds alone."""

import bz2
import itertools
import re
import tracemalloc
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.data import text_file
from neo_jax.data.prepare import prepare
from neo_jax.data.sources import find_sources
from neo_jax.data.text_file import TextFile, sections
from neo_jax.errors import NeoError
from neo_jax.evaluation.texts import read_documents, read_pages
from neo_jax.text.tokenizer import END_OF_TEXT, load_tokenizer

STORIES = [f"Once upon a time story {i} was told\nof a {'very ' * i}brave fox." for i in range(40)]


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("".join(f"{story}\n{END_OF_TEXT}\n" for story in STORIES))
    return path


def texts(documents):
    return [each.text if isinstance(each, TextFile) else each for each in documents]


def found(*paths, **options):
    return texts(itertools.chain(*(each.documents() for each in find_sources(paths, **options))))


@pytest.mark.parametrize("part", [1, 2, 3, 4, 5, 1000])
def test_lines_end_with_a_line_feed(tmp_path, monkeypatch, part):
    monkeypatch.setattr(text_file, "PART", part)
    text = "\ufeffone\r\n\r\ntwo\rthré\r\r\ne\r\n\ufeff\r"
    (tmp_path / "a.txt").write_bytes(text.encode())
    parts = list(TextFile(tmp_path / "a.txt").parts())
    assert "".join(parts) == text.replace("\r\n", "\n").removeprefix("\ufeff")
    assert all(0 < len(each) <= part for each in parts)


def expected_sections(text, separators):
    ends = "|".join(re.escape(each).replace("\\\n", "\r?\n") for each in separators)
    pieces = re.split(ends, text)
    if len(pieces) == 1:
        return [text.replace("\r\n", "\n")]
    return [piece.strip("\r\n").replace("\r\n", "\n") for piece in pieces]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["a", "é", "日本", "\n", "\r\n", "\r", "<|", "<|end|>", "=", "=="])),
    st.sampled_from([("<|end|>",), ("==\n", "<|end|>"), ("\n\n",)]),
    st.integers(1, 9),
    st.integers(20, 60),
)
def test_sections_are_those_of_the_whole_text(tmp_path_factory, pieces, separators, part, most):
    path = tmp_path_factory.getbasetemp() / "sections.txt"
    path.write_bytes("".join(pieces).encode())
    with mock.patch.multiple(text_file, PART=part, _MOST=most):
        assert texts(sections(path, separators)) == expected_sections("".join(pieces), separators)


@pytest.mark.parametrize("pack", [bytes, bz2.compress])
def test_long_sections(tmp_path, monkeypatch, pack):
    monkeypatch.setattr(text_file, "_MOST", 100)
    monkeypatch.setattr(text_file, "PART", 64)
    path = tmp_path / ("a.txt" if pack is bytes else "a.txt.bz2")
    long = ["é" * n for n in (500, 30, 700)]
    path.write_bytes(pack(f"\n{END_OF_TEXT}\n".join(long).encode()))
    documents = list(sections(path, [END_OF_TEXT]))
    assert [type(each) for each in documents] == [TextFile, str, TextFile]
    assert texts(documents) == long


def test_what_is_not_utf8_in_a_section_is_named_by_its_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xc3\xa9<|endoftext|>\n\xe9t\xe9")
    with pytest.raises(NeoError, match="byte 19 is 0xe9"):
        found(path)


def test_memory_does_not_grow_with_a_section(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line of words\n" * 500_000 + f"{END_OF_TEXT}b")
    tracemalloc.start()
    size = [sum(map(len, x.parts())) if isinstance(x, TextFile) else len(x)
            for x in sections(path, [END_OF_TEXT])]  # fmt: skip
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert size == [8_000_000 - 1, 1]


def test_ends_of_text_that_are_written_out_separate_documents(stories, capsys):
    assert found(stories, stories) == [*STORIES, "", *STORIES, ""]
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "documents of .txt files are what stands between <|endoftext|>"
    assert [document.text for document in read_documents([str(stories)])] == STORIES


def test_another_separator(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n***\r\ntwo\r\n<|endoftext|>\r\nthree\r\n")
    assert found(path, separator="***\n") == ["one", "two", "three"]
    assert not capsys.readouterr().err
    with pytest.raises(NeoError, match="at most 1000 characters"):
        found(path, separator="x" * 1001)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_ends_of_text_are_no_characters(stories, tmp_path, kind):
    """Neither what is learned nor what is encoded has the characters of "<|endoftext|>"."""
    options = {"train_tokenizer": 295, "tokenizer_kind": kind, "progress": False}
    fields = prepare([stories], tmp_path / "data", **options)
    assert fields["splits"]["train"]["documents"] == len(STORIES)
    assert fields["splits"]["train"]["bytes"] == sum(map(len, STORIES))
    tokenizer = load_tokenizer(tmp_path / "data")
    plain = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert not [text for text in plain if len(text) > 1 and set("|<>") & set(text)]


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_tokenizer_learns_no_end_of_text_from_lines_of_json(tmp_path, kind):
    lines = "".join(f'{{"text": "{END_OF_TEXT}{i} foxes{END_OF_TEXT}"}}\n' for i in range(100))
    (tmp_path / "a.jsonl").write_text(lines)
    size = 265 if kind == "bpe" else 276
    options = {"train_tokenizer": size, "tokenizer_kind": kind, "progress": False}
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", **options)
    tokenizer = load_tokenizer(tmp_path / "data")
    plain = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    assert not [text for text in plain if len(text) > 1 and set("|<>") & set(text)]


def test_evaluation_reads_line_feeds(tmp_path):
    for name, end in (("a.txt", "\n"), ("b.txt", "\r\n")):
        (tmp_path / name).write_bytes(end.join(["one", "", " = T = ", "two", ""]).encode())
    plain, other = ([d[0] for d in read_documents([str(tmp_path / n)])] for n in ("a.txt", "b.txt"))
    assert plain == other == ["one\n\n = T = \ntwo\n"]
    pages = [list(read_pages(str(tmp_path / name))) for name in ("a.txt", "b.txt")]
    assert pages[0] == pages[1]
