"""neo-jax recipe: examples that are made, metrics of answers, and a whole run by one command."""

import hashlib
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_jax.cli import main
from neo_jax.cli.train import load_defined
from neo_jax.errors import NeoError
from neo_jax.evaluation.answer_metrics import check_metrics, measure_answers
from neo_jax.evaluation.made_examples import MAKERS, Row, make_rows
from neo_jax.evaluation.recipes import Recipe, nearest_answers
from neo_jax.training.metrics import squad_words

# Of ten examples each: another digest means that all published figures are of other data.
DIGESTS = {
    "summaries": "b00c4c8659c129ea",
    "translation": "a3dc022e23508822",
    "questions": "6165609a19e2c6ae",
    "instructions": "2b0fad4ca3802876",
}


@pytest.mark.parametrize("task", MAKERS)
def test_examples_are_the_same_everywhere(task):
    rows = make_rows(task, 300, seed=0)
    digest = hashlib.sha256(json.dumps(rows[:10]).encode()).hexdigest()
    assert digest[:16] == DIGESTS[task]
    assert len({row.prompt for row in rows}) == 300
    more = make_rows(task, 300, seed=1, without=rows)
    assert not {row.prompt for row in rows} & {row.prompt for row in more}
    assert all(row.completion.startswith(" ") and not row.prompt.endswith(" ") for row in rows)


def test_answers_to_examples_are_right():
    for row in make_rows("instructions", 200, seed=3):
        _, given_words, _ = row.prompt.split("\n")
        words, answer = given_words.removeprefix("Input: ").split(), row.completion[1:]
        if row.kind == "backwards":
            assert answer.split()[::-1] == words
        elif row.kind == "capitals":
            assert answer.lower().split() == words
        elif row.kind == "count":
            assert answer == ["", "", "two", "three", "four", "five", "six"][len(words)]
    for row in make_rows("translation", 200, seed=3):
        is_feminine = any(word in row.prompt for word in ("houses", "letters", "doors", "flowers"))
        if "white" in row.prompt:
            assert (" blanches" in row.completion) == is_feminine
    for row in make_rows("questions", 200, seed=3):
        assert row.completion.strip() in row.prompt
    for row in make_rows("summaries", 200, seed=3):
        topic = row.completion.split("bill on ")[1].rstrip(".")
        verdicts = ("passed", "carried") if " passed " in row.completion else ("rejected", "lost")
        (decided,) = re.findall(r"bill on ([\w ]+) was (passed|carried|rejected|lost)", row.prompt)
        assert decided[0] == topic
        assert decided[1] in verdicts
    with pytest.raises(NeoError, match=r"no examples are made for 'sums'\. "):
        make_rows("sums", 1, 0)


TEXTS = st.lists(st.sampled_from(["The", "a", "fox", "Dog,", "an", "ran!", "x.y"]), max_size=6)


@given(TEXTS.filter(len), TEXTS.filter(len))
def test_squad_metrics_are_those_of_the_harness(answer, reference):
    """Which has them from T5, and that from SQuAD's script."""
    t5 = pytest.importorskip("lm_eval.tasks.super_glue.record.t5_utils")
    answer, reference = " ".join(answer), " ".join(reference)
    items = [(answer, f"0_{reference}")]
    for name, right in (("squad_em", t5.squad_em_agg), ("squad_f1", t5.squad_f1_agg)):
        value, error = measure_answers(name, [answer], [reference])
        assert value == pytest.approx(100 * right(items))
        assert error is None
    assert " ".join(squad_words(answer)) == t5.normalize_squad(answer)


def test_metrics_of_answers():
    answers, right = [" the fox runs\n", "a dog"], ["the fox ran", " a dog"]
    assert measure_answers("exact_match", answers, right) == (50, 50)
    # Two of three words in order: precision and recall 2/3.
    value, error = measure_answers("rouge_l", answers, right)
    assert value == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert error == pytest.approx(100 / 6)
    value, error = measure_answers("chrf", answers, right)
    import sacrebleu

    best = sacrebleu.corpus_chrf(["the fox runs", "a dog"], [["the fox ran", "a dog"]])
    assert (value, error) == (best.score, None)
    with pytest.raises(NeoError, match=r"no metric is called 'rouge'\. Did you mean 'rouge_l'"):
        check_metrics(["rouge"])


def test_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NeoError, match=r"chrf needs sacrebleu; pip install 'neo_jax\[recipes\]'"):
        check_metrics(["exact_match", "chrf"])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_nearest_prompt(tmp_path):
    pairs = [
        ("a fox met many other animals", "none"),
        ("the fox runs", "one"),
        ("the dog sleeps", "two"),
        ("the dog runs home", "three"),
    ]
    rows = [{"prompt": p, "completion": c} for p, c in pairs]
    files = (write(tmp_path / "pairs.jsonl", rows),)
    recipe = Recipe("questions", ("exact_match",), files, files)
    tests = [Row("a dog that sleeps", ""), Row("a dog runs", ""), Row("fox", "")]
    assert nearest_answers(recipe, tmp_path, tests) == ["two", "three", "one"]


@pytest.mark.parametrize("name", ["summaries", "translation", "questions", "instructions"])
def test_configs_have_a_recipe(name):
    assert load_defined(name, "recipe", Recipe).task == name


def test_a_recipe_from_end_to_end(checkpoints, tmp_path, capsys):
    """Given again, the command computes nothing; of another recipe the folder is left alone."""
    command = ["recipe", "questions", "--pretrained", str(checkpoints["bytes"]), "--output"]
    command += [str(tmp_path / "run"), "--steps", "2", "--length", "63", "--batch-size", "2"]
    pairs = [
        {"prompt": f"{i}?", "completion": f" It is {i}.", "kind": "odd" if i % 2 else "even"}
        for i in range(40)
    ]
    files = ["--examples", write(tmp_path / "a.jsonl", pairs[:34])]
    files += ["--test-examples", write(tmp_path / "b.jsonl", pairs[34:])]
    command += [*files, "--max-new-tokens", "4", "--held-out", "0.2", "--num-tests", "5"]
    assert main([*command, "--optimizer.warmup-steps", "1"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["metric", "examples", "nearest", "before", "after", "±"]
    assert [line[0] for line in lines[1:]] == ["all", "all", "even", "odd"]
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers-2.jsonl").open()]
    assert [row["prompt"] for row in answers] == [pair["prompt"] for pair in pairs[34:39]]
    assert (tmp_path / "run" / "results.png").stat().st_size > 5000
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").glob("answers-*")}
    assert main([*command, "--optimizer.warmup-steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert found == json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["step"] == 2
    assert found["scores"][2]["kind"] == "even"
    assert found["scores"][2]["examples"] == 3
    assert main([*command, "--max-new-tokens", "5"]) == 1
    assert "is of another recipe: --max-new-tokens was 4, and is 5;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        ([], 2, "name a recipe first: one of instructions, questions, summaries, translation,"),
        (["cpu"], 1, "does not define a Recipe called `recipe`"),
        (["questions", "--examples", "a.jsonl"], 2, "give both --examples and --test-examples"),
        (["questions", "--metrics", "rouge"], 2, "no metric is called 'rouge'"),
        (["questions", "--output", "gs://x/y"], 2, "--output is a folder on disk"),
    ],
)
def test_recipes_that_are_none(args, status, message, capsys):
    assert main(["recipe", *args]) == status
    assert message in capsys.readouterr().err
