"""neo-jax eval --suite model-card: the benchmarks' tasks, and the published results beside."""

import json
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest

import neo_jax
from neo_jax import cli
from neo_jax.config import ModelConfig, preset
from neo_jax.errors import NeoError
from neo_jax.evaluation import card, suite, tasks, texts
from neo_jax.evaluation.reference_results import BENCHMARKS, MEASURES, PUBLISHED, find_published

EXAMPLES = {
    "pile": [{"text": "Call me Ishmael: some years ago"}, {"text": "never mind how long it " * 5}],
    "lambada": [{"text": "the dog the fox"}, {"text": "a café sells cups"}, {"text": "call me"}],
    "winogrande": [
        {"sentence": "the fox and _ sell it", "option1": "it", "option2": "cups", "answer": "2"},
        {"sentence": "a _ is a dog", "option1": "dog", "option2": "fox", "answer": "1"},
    ],
    "hellaswag": [
        {
            "activity_label": "Cups", "ctx_a": "A dog sits.", "ctx_b": "the dog",
            "endings": ["is.", "runs [title] off.", "sells a cup.", "sees a fox."], "label": "2",
        }
    ],
    "mathqa": [
        {"Problem": "2 and 3 ?", "options": "a ) 5 , b ) 6 , c ) 7 , d ) 8 , e ) 9", "correct": "a"}
    ],
    "pubmedqa": [{"QUESTION": "Do dogs?", "CONTEXTS": ["Dogs.", "Do."], "final_decision": "yes"}],
    "piqa": [
        {"goal": "sell a cup", "sol1": "call me", "sol2": "never mind the dog", "label": 1},
        {"goal": "long", "sol1": "how", "sol2": "it", "label": 0},
        {"goal": "mind it", "sol1": "the fox", "sol2": "a dog", "label": 1},
    ],
}  # fmt: skip
WIKITEXT = (
    " = Dogs = \n \n The dog , a fox . \n = = Cups = = \n It sells 2 @,@ 000 cups . \n"
    " = It = \n Me .\n"
)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


@pytest.fixture(scope="module")
def manager():
    """Of the harness's thousands of tasks those of the suite."""
    home = Path(lm_eval.tasks.__file__).parent
    names = [each.task.split("_")[0] for each in BENCHMARKS.values() if each.task != "pile"]
    return tasks._Tasks(include_path=[str(home / name) for name in names], include_defaults=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of every benchmark, by its name."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "wiki.raw").write_text(WIKITEXT)
    for name, lines in EXAMPLES.items():
        more = [{**line, "id": 3} for line in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in more))
    return {
        name: str(folder / ("wiki.raw" if name == "wikitext" else f"{name}.jsonl"))
        for name in BENCHMARKS
    }


@pytest.fixture
def run(monkeypatch, manager, capsys, checkpoints):
    """Runs the suite's command line; returns its status, its output and its errors."""
    monkeypatch.setattr(tasks, "open_tasks", lambda folders: manager)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")

    def call(*args):
        model = ["--model", str(checkpoints["bytes"])]
        status = cli.main(["eval", "--suite", "model-card", *model, *map(str, args)])
        return status, *capsys.readouterr()

    return call


def likely(lm, context, continuation):
    """log p of a continuation after a context, by a pass over both alone."""
    ids, before = lm.encode(context + continuation), len(lm.encode(context))
    (score,) = lm.score([ids])
    return score.logprobs[before - 1 :].sum()


def test_every_benchmark_beside_what_was_published(run, lm, files, tmp_path, monkeypatch):
    """One run: values against plain computations, the table, the picture and the files."""
    monkeypatch.setattr(
        "neo_jax.evaluation.reference_results.find_published", lambda config: "gpt2-xl"
    )
    words = [f"{name}={file}" for name, file in files.items()]
    out, png = tmp_path / "out", tmp_path / "card.png"
    status, text, err = run("--data", *words, "--json", "--output", out, "--picture", png)
    assert status == 0, err
    results = json.loads(text)
    rows = results["model_card"]["rows"]
    assert results["model_card"]["published"] == "GPT-2 1.5B"
    assert results["model_card"]["left_out"] == {}
    value = {(row["benchmark"], row["unit"]): row["value"] for row in rows}
    assert len(value) == len(MEASURES)

    def best(*choices):
        return int(np.argmax(choices))

    right = [
        best(*(likely(lm, f"Question: {e['goal']}\nAnswer:", f" {e[s]}") for s in ("sol1", "sol2")))
        == e["label"]
        for e in EXAMPLES["piqa"]
    ]
    assert value["PIQA", "acc, %"] == pytest.approx(100 * np.mean(right))
    right = []
    for e in EXAMPLES["winogrande"]:
        start, end = e["sentence"].split("_")
        logprobs = [likely(lm, start + e[option], end) for option in ("option1", "option2")]
        right.append(best(*logprobs) == int(e["answer"]) - 1)
    assert value["WinoGrande", "acc, %"] == pytest.approx(100 * np.mean(right))
    logprobs = []
    for e in EXAMPLES["lambada"]:
        start, last = e["text"].rsplit(" ", 1)
        logprobs.append(likely(lm, start, f" {last}"))
    assert value["LAMBADA", "ppl"] == pytest.approx(np.exp(-np.mean(logprobs)), rel=1e-4)
    for name, is_wikitext in (("pile", False), ("wikitext", True)):
        total = texts.Total()
        for _, part in texts.measure(lm, texts.read_documents([files[name]], is_wikitext), 64):
            total.add(part)
        assert total.documents == 2
        if is_wikitext:
            found, expected = value["WikiText", "ppl/word"], total.word_perplexity
        else:
            found, expected = value["The Pile", "bits/byte"], total.bits_per_byte
        assert found == pytest.approx(expected, rel=1e-5)
    for row in rows:
        assert row["difference"] == row["value"] - row["published"]
    assert png.read_bytes().startswith(b"\x89PNG")
    (path,) = out.rglob("results_*.json")
    written = json.loads(path.read_text())
    assert written["results"]["piqa"]["acc,none"] == results["results"]["piqa"]["acc,none"]
    assert written["configs"]["piqa"]["dataset_path"] == files["piqa"]


def test_what_cannot_be_fetched_is_left_out(run, files, monkeypatch):
    def fetch(path, **_):
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    status, out, err = run("--data", f"piqa={files['piqa']}", "--limit", "2")
    assert status == 0
    head, piqa, foot = out.splitlines()
    assert head.split() == ["unit", "examples", "here", "±"]  # no model of this shape is published
    assert piqa.split()[:4] == ["PIQA", "acc,", "%", "2"]
    assert foot.startswith("no results are published of a model of this shape")
    told = [line for line in err.splitlines() if "is left out" in line]
    assert [line.split()[0] for line in told] == [
        "wikitext", "lambada", "winogrande", "hellaswag", "mathqa", "pubmedqa",
    ]  # fmt: skip
    assert told[0] == (
        "wikitext is left out: Couldn't reach 'EleutherAI/wikitext_document_level' on the Hub; "
        "give --data wikitext=FILE, JSON lines with page."
    )
    status, out, err = run()
    assert (status, out) == (1, "")
    assert err.startswith("neo-jax: no benchmark's data can be had; of wikitext: Couldn't reach")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lambada"], "--data lambada names no file; write it as in --data lambada=FILE"),
        (["lambda=a.jsonl"], "no benchmark 'lambda'. Did you mean 'lambada'"),
        (["piqa=a.jsonl", "piqa=b.jsonl"], "--data names piqa twice"),
    ],
)
def test_files_that_are_not_said_well(words, message):
    with pytest.raises(NeoError, match=message):
        suite.read_data(words)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("piqa", None, r"cannot read .*data\.jsonl: No such file"),
        ("piqa", "", r"data\.jsonl is empty; give --data piqa=FILE, JSON lines with goal, sol1,"),
        ("piqa", '{"goal": "a", "sol1": "b"}', r"data\.jsonl:1: no 'sol2'; piqa needs goal, sol1"),
        ("lambada", '{"text": 1}\n{"text": "a"}', r"data\.jsonl: the lines differ in kind"),
        (
            "mathqa",
            '{"Problem": "a", "options": "a ) 5 , b ) 6", "correct": "x"}',
            r"data\.jsonl is not what mathqa reads: 'x' is not in list; correct it",
        ),
    ],
)
def test_files_that_hold_something_else(manager, tmp_path, name, text, message):
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(NeoError, match=message):
        suite.load_tasks(manager, {name: str(path)})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "model-cart"], "no suite is called 'model-cart'. Did you mean 'model-card'"),
        (["--suite", "model-card", "--tasks", "piqa"], "give either --text FILE or --tasks"),
        (["--suite", "model-card", "--gen-kwargs", "a=1"], "--gen-kwargs goes with --tasks"),
        (["--tasks", "piqa", "--data", "piqa=a"], "--data goes with --suite model-card"),
        (["--tasks", "piqa", "--picture", "a.png"], "--picture goes with --suite model-card"),
    ],
)
def test_options_that_do_not_go_together(args, message, capsys):
    assert cli.main(["eval", *args]) == 2
    assert message in capsys.readouterr().err


def test_the_published_model_of_a_shape():
    for name, numbers in PUBLISHED.items():
        assert find_published(preset(name)) == name
        assert len(numbers) == len(MEASURES)
    assert find_published(ModelConfig(num_layers=2)) == ""
    assert find_published(preset("gpt2")) == ""  # as wide and deep as gpt-neo-125m


def test_the_table():
    results = {
        "results": {
            "lambada_openai": {
                "perplexity,none": 8.498, "perplexity_stderr,none": 0.25,
                "acc,none": 0.5623, "acc_stderr,none": "N/A",
            },
            "wikitext": {"word_perplexity,none": 12345.6},
        },
        "n-samples": {"lambada_openai": {"effective": 100}, "wikitext": {"effective": 62}},
    }  # fmt: skip
    rows = card.rows(results, "gpt-neo-1.3b")
    assert card.table(rows, "gpt-neo-1.3b")[1:] == [
        ["WikiText", "ppl/word", "62", "12,346", "-", "13.100", "+12,332"],
        ["LAMBADA", "ppl", "100", "8.498", "0.250", "7.498", "+1.000"],
        ["LAMBADA", "acc, %", "100", "56.23", "-", "57.23", "-1.00"],
    ]
    assert "GPT-Neo 1.3B, README of github.com/EleutherAI/gpt-neo" in card.footer("gpt-neo-1.3b")
