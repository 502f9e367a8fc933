"""data/passages.py: of few long documents passages are held out."""

import json
import shutil

import numpy as np
import pytest

from neo_jax.data.passages import LENGTH, are_few, by_passages
from neo_jax.data.prepare import prepare
from neo_jax.data.sources import Pair, Source, find_sources
from neo_jax.errors import NeoError
from neo_jax.text.tokenizer import load_tokenizer

LINES = [
    f"{i}: the quick brown fox jumps over the lazy dog, and the dog sleeps." for i in range(900)
]
BOOK = "\n".join(LINES) + "\n"


def source(documents):
    return Source("in", "1", lambda: iter(documents))


def texts(folder, split):
    """The documents of a split, as text."""
    offsets = np.load(folder / split / "offsets.npy")
    tokens = np.fromfile(folder / split / "tokens.bin", np.uint16)
    cut = np.split(tokens, offsets[1:-1])
    return [load_tokenizer(folder).decode(ids.tolist()) for ids in cut]


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("number", [1, 3])
def test_a_share_of_the_text_is_held_out_and_nothing_is_lost(share, number):
    documents = [BOOK, BOOK.replace("fox", "cat"), "a short one"][:number]
    assert are_few([source(documents)], share) == (number * min(share, 1 - share) < 3)
    (held,) = by_passages([source(documents)], share)
    runs = [*held.documents()]
    assert "".join(run.text for run in runs) == "".join(documents)
    characters = sum(len(run.text) for run in runs if run.is_held_out)
    assert characters / len("".join(documents)) == pytest.approx(share, rel=0.25)
    for run in runs[:-1]:
        assert run.text.endswith(("\n", "a short one"))
        assert len(run.text) >= LENGTH or "short" in run.text
    assert [*held.documents()] == runs  # as a source is read again after an interruption


def test_documents_are_cut_only_where_whole_ones_are_too_few():
    assert not are_few([source([BOOK])], 0.0)
    assert not are_few([source(["short"] * 5)], 0.1)
    assert not are_few([source([BOOK] * 100)], 0.03)
    assert are_few([source([BOOK] * 99)], 0.03)
    assert not are_few([source([Pair(BOOK, BOOK)])], 0.1)
    assert not are_few([source([])], 0.1)


def test_texts_without_lines_are_cut_between_words_and_without_words_anywhere():
    for document in (" ".join(LINES), "x" * 90_000):
        (held,) = by_passages([source([document])], 0.1)
        runs = [run.text for run in held.documents()]
        assert "".join(runs) == document
        assert len(runs) >= 5
        assert all(text.startswith(" ") for text in runs[1:]) == (" " in document)


def test_many_files_do_not_all_hold_out_the_same_place():
    many = [source([BOOK[: 6 * LENGTH]]) for _ in range(40)]
    runs = [[run.is_held_out for run in held.documents()] for held in by_passages(many, 0.03)]
    assert 4 <= sum(map(any, runs)) <= 12  # of 200 passages some 6


def test_a_single_file_is_prepared_with_something_held_out(tmp_path, capsys, tokenizer_folders):
    (tmp_path / "my.txt").write_text(BOOK)
    options = {"held_out": 0.03, "progress": None}
    prepare([tmp_path / "my.txt"], tmp_path / "out", tokenizer_folders["bytes"], **options)
    assert "passages of 1,000 characters or more are held out" in capsys.readouterr().err
    held_out, train = texts(tmp_path / "out", "held_out"), texts(tmp_path / "out", "train")
    assert len(held_out) == 2
    assert len(train) == 3
    assert train[0] + held_out[0] + train[1] + held_out[1] + train[2] == BOOK
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in LINES))
    prepare([tmp_path / "many.jsonl"], tmp_path / "out", tokenizer_folders["bytes"], **options)
    assert "passages" not in capsys.readouterr().err


def test_too_little_text_says_what_to_do(tmp_path, tokenizer_folders):
    (tmp_path / "my.txt").write_text(BOOK[: 5 * LENGTH])
    with pytest.raises(NeoError, match="choose a larger share, or give more documents"):
        prepare([tmp_path], tmp_path / "out", tokenizer_folders["bytes"], held_out=0.03)


def test_a_tokenizer_is_trained_without_the_passages_that_are_held_out(tmp_path):
    rare = BOOK[: 17 * 1060].splitlines()
    lines = LINES[: len(rare)] + LINES
    (tmp_path / "my.txt").write_text("\n".join(lines))
    (held,) = by_passages(find_sources([tmp_path / "my.txt"]), 0.1)
    secret = next(run.text for run in held.documents() if run.is_held_out)
    changed = "\n".join(lines).replace(secret, secret.replace("quick", "qqqqq"), 1)
    (tmp_path / "my.txt").write_text(changed)
    out = tmp_path / "out"
    options = {"train_tokenizer": 300, "tokenizer_kind": "bpe"}
    prepare([tmp_path / "my.txt"], out, held_out=0.1, **options)
    assert "qqqqq" in "".join(texts(out, "held_out"))
    assert len(load_tokenizer(out).encode(" qqqqq")) == 6  # no merge has been learned
