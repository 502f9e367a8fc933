"""neo-jax eval."""

import json
import sys

import pytest

import neo_jax
from neo_jax.evaluation.texts import Total, measure, read_documents


@pytest.fixture
def model(checkpoints):
    return ["--model", checkpoints["bytes"]]


@pytest.fixture
def pile(tmp_path):
    """Documents of two subsets of The Pile."""
    path = tmp_path / "pile.jsonl"
    lines = [("ArXiv", "the dog"), ("Books3", "Call me Ishmael: some years ago"), ("ArXiv", "fox")]
    path.write_text(
        "".join(json.dumps({"text": t, "meta": {"pile_set_name": s}}) + "\n" for s, t in lines)
    )
    return path


def test_texts_by_subset(succeed, model, checkpoints, pile):
    found = json.loads(succeed("eval", "--text", pile, "--json", *model))
    totals = {name: Total() for name in ("ArXiv", "Books3", "all")}
    for name, total in measure(neo_jax.load(checkpoints["bytes"]), read_documents([str(pile)])):
        totals[name].add(total)
        totals["all"].add(total)
    assert (found["context"], found["stride"], found["first_token_scored"]) == (64, 32, True)
    assert list(found["subsets"]) == list(totals)
    for name, total in totals.items():
        assert found["subsets"][name]["bits_per_byte"] == pytest.approx(total.bits_per_byte)
        assert found["subsets"][name]["bytes"] == total.num_bytes
    table = succeed("eval", "--text", pile, "--stride", "64", "--by-position", *model).splitlines()
    assert table[0].split()[:2] == ["documents", "tokens"]
    assert [row.split()[0] for row in table[1:4]] == list(totals)
    assert f"{totals['ArXiv'].bits_per_byte:.4f}" in table[1]
    assert table[4].startswith("context 64, stride 64; the first token of a document is predicted")
    assert table[5].split() == ["tokens", "before", "tokens", "nats/token"]
    everything = totals["all"]
    loss = f"{everything.nats / everything.tokens:.4f}"
    assert table[6].split() == ["1-64", str(everything.tokens), loss]


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "give either --text FILE or --tasks"),
        (["--text", "a.txt", "--tasks", "piqa"], 2, "give either --text FILE or --tasks"),
        (["--tasks", "piqa", "--wikitext"], 2, "--wikitext goes with --text"),
        (["--tasks", "piqa", "--by-position"], 2, "--by-position goes with --text"),
        (["--tasks", "piqa", "--limit", "-1"], 2, "--limit must be 0 or more"),
        (["--text", "nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["--tasks", "piqa", "--include-path", "nowhere"], 1, "nowhere is no folder"),
    ],
)
def test_what_cannot_be_evaluated(fail, model, args, status, message):
    assert message in fail("eval", *args, *model, status=status)


def test_a_task_that_is_not_there(fail, model, few_tasks):
    expected = "'piqqa' is no task of the harness, nor of --include-path. Did you mean 'piqa'"
    assert expected in fail("eval", "--tasks", "piqqa", *model, status=1)


def test_help_says_what_is_a_program(succeed):
    for args, words in (
        (["eval"], "Task files are programs"),
        (["train"], "A .py file is a program that runs"),
        (["train", "cpu"], "A config is a program that runs"),
    ):
        assert words in " ".join(succeed(*args, "--help").replace("│", " ").split())


def test_tasks_without_the_harness(fail, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'neo_jax[eval]'" in fail("eval", "--tasks", "piqa", *model)
