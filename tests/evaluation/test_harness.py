"""evaluation/harness.py: the same answers as the harness's own PyTorch model."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import neo_jax
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.evaluation import harness
from neo_jax.evaluation import tasks as running
from neo_jax.evaluation.harness import NeoLM
from neo_jax.evaluation.response_cache import Answers
from neo_jax.labels import HeadConfig
from neo_jax.text.language_model import LanguageModel

pytestmark = pytest.mark.optimized

NAMES = ["last_word", "choices", "whole", "completion"]


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


@pytest.fixture(scope="module")
def hf(checkpoints):
    """The harness's own model, with transformers."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=str(checkpoints["bytes"]), dtype="float32", device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def manager(tasks):
    """The tasks of the folder, without the thousands that the harness brings."""
    return TaskManager(include_path=str(tasks), include_defaults=False)


@pytest.fixture(scope="module")
def theirs(hf, manager):
    """What the harness finds with transformers."""
    return simple_evaluate(hf, tasks=NAMES, task_manager=manager, bootstrap_iters=0)


@pytest.fixture(scope="module")
def ours(lm, manager):
    """What it finds with us."""
    return running.run(NeoLM(lm, cache="none"), NAMES, manager)


def answers(results, name):
    """What the model answered to each example: texts, or log-likelihoods and whether greedy."""
    found = []
    for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"]):
        found += [response for request in sample["resps"] for response in request]
    return found


@pytest.mark.parametrize("name", ["last_word", "choices"])
def test_continuations_are_as_likely_as_transformers_says(ours, theirs, name):
    pairs, expected = answers(ours, name), answers(theirs, name)
    assert [greedy for _, greedy in pairs] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([p for p, _ in pairs], [p for p, _ in expected], rtol=0, atol=1e-4)
    assert len({round(p, 3) for p, _ in pairs}) > 4


def test_whole_texts_are_as_likely(ours, theirs):
    found, expected = answers(ours, "whole"), answers(theirs, "whole")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_texts_go_on_alike(ours, theirs):
    found = answers(ours, "completion")
    assert found == answers(theirs, "completion")
    assert len(set(found)) > 1
    assert not any("e" in text or " f" in text for text in found)


def test_the_results_are_the_same(ours, theirs):
    for name in NAMES:
        found, expected = ours["results"][name], theirs["results"][name]
        for metric, value in expected.items():
            if isinstance(value, float) and "stderr" not in metric:
                assert found[metric] == pytest.approx(value, rel=1e-5), metric
    assert "last_word" in running.table(ours)


def test_examples_come_before_a_question(lm, hf, manager):
    """Few-shot: the contexts are longer, and the harness makes the same ones for both."""
    found = running.run(NeoLM(lm, cache="none"), ["choices"], manager, num_fewshot=2, limit=2)
    options = {"num_fewshot": 2, "limit": 2, "bootstrap_iters": 0}
    expected = simple_evaluate(hf, tasks=["choices"], task_manager=manager, **options)
    assert found["n-shot"] == {"choices": 2}
    np.testing.assert_allclose(
        answers(found, "choices"), answers(expected, "choices"), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("mesh", "batch_size", "names"), [("", 1, ["choices"]), ("data=4,model=2", 3, NAMES)]
)
def test_batches_and_meshes_do_not_matter(ours, checkpoints, manager, mesh, batch_size, names):
    model = NeoLM(str(checkpoints["bytes"]), mesh=mesh, cache="none", batch_size=batch_size)
    results = running.run(model, names, manager)
    for name in names:
        found, expected = answers(results, name), answers(ours, name)
        if name == "completion":
            assert found == expected
        else:
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert bool(model.get_model_info()["model_mesh"]) == bool(mesh)


# The command, in a process that is killed when nine requests are finished, without a last word.
KILLED = """
import os, signal, sys
from lm_eval.tasks import manager
from neo_jax.cli import main
from neo_jax.evaluation.response_cache import Answers
from neo_jax.labels import HeadConfig
from neo_jax.text.language_model import LanguageModel

add, finished = Answers.add, []

def kill_after_nine(self, *args):
    add(self, *args)
    finished.append(args)
    if len(finished) == 9:
        os.kill(os.getpid(), signal.SIGKILL)

Answers.add = kill_after_nine
manager.__file__ = sys.argv[1]
main(["eval", *sys.argv[2:]])
"""


def kept(cache):
    """The finished requests on disk; one that is kept again gets another rowid."""
    with contextlib.closing(sqlite3.connect(cache)) as database:
        return set(database.execute("SELECT rowid, key, answer FROM answers"))


def test_killed_and_begun_again(ours, lm, manager, tasks, tmp_path, monkeypatch, few_tasks):
    """The rest is computed, only that, and the results are those of a run left alone."""
    cache, names = tmp_path / "answers", ["choices", "whole"]
    options = ["--tasks", ",".join(names), "--include-path", tasks, "--cache", cache]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, few_tasks, *options, "--model", lm.folder],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)},
        timeout=120,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    before = kept(cache)
    assert len(before) == 9
    computed = []
    score, read = harness.score_continuations, harness.score_ids

    def counted_score(model, params, requests, *args):
        computed.extend(requests)
        return score(model, params, requests, *args)

    def counted_read(model, params, texts, *args):
        computed.extend(texts)
        return read(model, params, texts, *args)

    monkeypatch.setattr(harness, "score_continuations", counted_score)
    monkeypatch.setattr(harness, "score_ids", counted_read)

    def run():
        return running.run(NeoLM(lm, cache=str(cache)), names, manager)

    results = run()
    found = [answers(results, name) for name in names]
    for name, values in zip(names, found, strict=True):
        np.testing.assert_allclose(values, answers(ours, name), rtol=0, atol=1e-4)
        for metric, value in ours["results"][name].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert results["results"][name][metric] == pytest.approx(value, rel=1e-6)
    assert len(computed) == sum(map(len, found)) - 9 > 9
    assert before < kept(cache)
    computed.clear()
    assert [answers(run(), name) for name in names] == found
    assert computed == []


def test_which_tasks_names_mean(manager, tasks):
    path = str(tasks / "whole.yaml")
    assert running.find_tasks(["*w*", "choices", path], manager) == [
        "last_word", "whole", "choices", path,
    ]  # fmt: skip
    with pytest.raises(NeoError, match=r"there is no task file nowhere\.yaml"):
        running.find_tasks(["nowhere.yaml"], manager)
    with pytest.raises(NeoError, match=r"'choice' is no task .* Did you mean 'choices'"):
        running.find_tasks(["choice"], manager)


def test_data_that_is_not_there(lm, tasks, tmp_path):
    text = (tasks / "whole.yaml").read_text().replace("whole.jsonl", "nowhere.jsonl")
    (tmp_path / "whole.yaml").write_text(text)
    model = NeoLM(lm, cache="none")
    manager = running._Tasks(include_path=[str(tmp_path)], include_defaults=False)
    with pytest.raises(NeoError, match=r"cannot load whole: Unable to find .*; where the data"):
        running.run(model, ["whole"], manager)


class Asked:
    """A request of the harness."""

    task_name, doc_id = "a", 3

    def __init__(self, *args):
        self.args = args


@pytest.mark.parametrize(
    ("kind", "args", "message"),
    [
        ("loglikelihood", ("the fox", ""), "task 'a', example 3: the continuation '' is empty"),
        ("loglikelihood", ("", ""), "task 'a', example 3: the continuation '' is empty"),
        ("loglikelihood", ("it", "x y" * 50), "the continuation has .* the model's context 64"),
        ("generate_until", ("it", {"max_gen_toks": 64}), "task 'a' requests 64 new tokens, the"),
        (
            "loglikelihood",
            ("", "<|endoftext|>"),
            "example 3: the continuation '<|endoftext|>' is",
        ),
        ("generate_until", ("it", {"tempature": 1.0}), "task 'a': unknown option 'tempature'. Did"),
        ("generate_until", ("it", {"do_sample": "yes"}), "task 'a': do_sample must be true or"),
        ("generate_until", ("it", {"temperature": "hot"}), "task 'a': temperature must be a num"),
        ("generate_until", ("it", {"max_tokens": "many"}), "task 'a': max_gen_toks must be a"),
        ("generate_until", ("it", {"until": 5}), "task 'a': stop must be a text or a list"),
        ("generate_until", ("it", {"until": ["a", 5]}), "task 'a': stop must be a text or a list"),
        (
            "generate_until",
            ("it", {"max_gen_toks": 9, "max_new_tokens": 8}),
            "task 'a': max_gen_toks is 9 and max_new_tokens 8, which mean the same; give one",
        ),
        (
            "generate_until",
            ("it", {"num_beams": 2, "do_sample": True}),
            "task 'a': temperature has no effect on beam search",
        ),
    ],
)
def test_what_a_model_cannot_do(lm, kind, args, message):
    with pytest.raises(NeoError, match=re.escape(message).replace(r"\.\*", ".*")):
        getattr(NeoLM(lm, cache="none"), kind)([Asked(*args)])


def test_a_classifier_is_refused_before_tasks_are_read(lm):
    config = dataclasses.replace(lm.config, head=HeadConfig(kind="score", labels=("no", "yes")))
    judge = LanguageModel(lm.model.clone(config=config), {}, lm.tokenizer, lm.folder)
    with pytest.raises(NeoError, match="the model is a classifier"):
        NeoLM(judge)


def go_on(model, *several):
    """What a model writes after "the dog" with each of several arguments of generation."""
    requests = [Asked("the dog", {"max_gen_toks": 8} | options) for options in several]
    return model.generate_until(requests, disable_tqdm=True)


def drawn(lm, seed=0, **options):
    """The same by `LanguageModel`, with transformers' defaults."""
    options = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | options
    return lm.generate("the dog", 8, seed=seed, **options)


def test_repeats_are_drawn_apart(lm, tmp_path, monkeypatch):
    """The i-th is the draw of seed + i, also from disk; what is not drawn repeats itself."""
    cache = str(tmp_path / "answers")
    hot = {"do_sample": True, "temperature": 1.0}
    expected = [drawn(lm, seed) for seed in range(4)]
    assert len(set(expected)) == 4
    assert go_on(NeoLM(lm, cache=cache), hot, hot) == expected[:2]
    assert go_on(NeoLM(lm, cache=cache), hot, hot, hot, hot) == expected
    assert go_on(NeoLM(lm, cache="none"), hot | {"seed": 2}, {}, hot | {"seed": 2}) == [
        expected[2], lm.generate("the dog", 8, temperature=0), expected[3],
    ]  # fmt: skip
    monkeypatch.setattr(lm, "samples", None)  # all of it is on disk
    assert go_on(NeoLM(lm, cache=cache), hot, hot, hot, hot) == expected
    monkeypatch.undo()
    assert len(set(go_on(NeoLM(lm, cache=cache), *[{}] * 3))) == 1


def test_whether_a_text_is_drawn(lm):
    """As in the harness; and what is drawn without a temperature has that of transformers, 1."""
    model, greedy = NeoLM(lm, cache="none"), lm.generate("the dog", 8, temperature=0)
    for said, options in (
        ({"do_sample": True}, {}),
        ({"do_sample": True, "top_p": 0.95}, {"top_p": 0.95}),
        ({"do_sample": True, "top_k": 0, "temperature": None}, {"top_k": 0}),
        ({"temperature": 0.8}, {"temperature": 0.8}),
    ):
        assert go_on(model, said) == [drawn(lm, **options)] != [greedy]
    for said in (
        {},
        {"do_sample": False},
        {"do_sample": False, "temperature": 0.8, "top_p": 0.5, "top_k": 3, "seed": 5},
        {"do_sample": True, "temperature": 0.0},
        {"top_p": 0.9},
    ):
        assert go_on(model, said) == [greedy]


def test_other_names_of_arguments(lm):
    model = NeoLM(lm, cache="none")
    expected = lm.generate("the dog", 5, temperature=0)
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        request = Asked("the dog", {name: 5, "max_gen_toks": 5})
        assert model.generate_until([request], disable_tqdm=True) == [expected]
    beams = {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}
    assert go_on(model, beams | {"do_sample": False, "temperature": 0.0}) == [
        lm.generate("the dog", 8, temperature=0, **beams)
    ]
    assert go_on(model, {"stop": " "}) == go_on(model, {"until": [" ", ""]})


def test_a_token_over_the_border(lm, hf):
    """One token holds the context's end and the continuation, which then is encoded by itself."""
    word = next(
        word
        for word in (lm.tokenizer.decode([i]) for i in range(lm.config.vocab_size))
        if len(word) > 2 and word.isalpha()
    )
    assert len(lm.encode(word)) == 1
    model = NeoLM(lm, cache="none")
    border = Asked(word[:-1], word[-1])
    other = Asked("the dog", " sells")
    (logprob, _), *others = model.loglikelihood([border, other], disable_tqdm=True)
    context, ids = lm.encode(word[:-1]), lm.encode(word[-1])
    (score,) = lm.score([context + ids])
    assert logprob == pytest.approx(score.logprobs[-len(ids) :].sum(), rel=1e-5)
    np.testing.assert_allclose(others, hf.loglikelihood([other], disable_tqdm=True), atol=1e-4)
    with pytest.raises(AssertionError):  # the harness's own ends here
        hf.loglikelihood([border], disable_tqdm=True)


def test_a_context_of_white_space_begins_a_text(lm):
    model = NeoLM(lm, cache="none")
    found = model.loglikelihood([Asked(" ", "the dog"), Asked("", " the dog")], disable_tqdm=True)
    assert found[0] == found[1]


def test_damaged_answers_are_computed_again(lm, tmp_path, capsys):
    cache, requests = tmp_path / "answers", [Asked("the dog", word) for word in (" a", " b", " c")]
    expected = NeoLM(lm, cache=str(cache)).loglikelihood(requests, disable_tqdm=True)
    with contextlib.closing(sqlite3.connect(cache)) as database, database:
        key = database.execute("SELECT min(key) FROM answers").fetchone()
        database.execute("UPDATE answers SET answer = '[0.0, true]' WHERE key = ?", key)
    for line in ("1 finished requests on disk are damaged and computed again.\n", ""):
        found = NeoLM(lm, cache=str(cache)).loglikelihood(requests, disable_tqdm=True)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("kind", "requests", "poison"),
    [
        ("loglikelihood", [Asked("the dog", " a")], [0.0, "yes"]),
        ("loglikelihood_rolling", [Asked("the dog")], "nothing"),
        ("generate_until", [Asked("the dog", {"max_gen_toks": 3})], [0.0, True]),
    ],
)
def test_answers_of_another_kind(lm, tmp_path, monkeypatch, kind, requests, poison):
    """As in a file that was made to deceive, with its checksums: they are computed again."""
    cache, add = str(tmp_path / "answers"), Answers.add
    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", lambda self, request, _: add(self, request, poison))
        expected = getattr(NeoLM(lm, cache=cache), kind)(requests, disable_tqdm=True)
    for _ in range(2):
        assert getattr(NeoLM(lm, cache=cache), kind)(requests, disable_tqdm=True) == expected


def test_a_task_that_fails(lm, tasks, tmp_path):
    """In its filters and metrics, after the model has answered: one line, which names where."""
    task = yaml.safe_load((tasks / "completion.yaml").read_text())
    task |= {"repeats": 2, "generation_kwargs": {"max_gen_toks": 3, "do_sample": True}}
    for name, count in (("few", 2), ("many", 3)):
        filters = [{"name": "all", "filter": [{"function": "take_first_k", "k": count}]}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task | {"filter_list": filters}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = NeoLM(lm, cache="none")
    (few,) = running.run(model, [str(tmp_path / "few.yaml")], manager, limit=1)["samples"].values()
    assert len(set(few[0]["resps"][0])) == 2
    with pytest.raises(
        NeoError, match=r"selection\.py: AssertionError: Need at least 3 resp.* task"
    ):
        running.run(model, [str(tmp_path / "many.yaml")], manager, limit=1)


def test_results_that_cannot_be_written(lm, manager, tmp_path, monkeypatch):
    """Before anything runs; or after, where the harness itself would only have warned."""
    model, file = NeoLM(lm, cache="none"), tmp_path / "file"
    file.touch()
    with pytest.raises(NeoError, match=r"cannot write in .*file"):
        running.run(model, ["whole"], manager, limit=1, output=str(file))
    folder = tmp_path / "results"
    running.run(model, ["whole"], manager, limit=1, output=str(folder))
    names = [path.name.split("_2")[0] for path in folder.rglob("*.json*")]
    assert sorted(names) == ["results", "samples_whole"]
    monkeypatch.setattr(running.EvaluationTracker, "save_results_samples", lambda *_, **__: None)
    with pytest.raises(NeoError, match=r"not all results could be written in .*results; run"):
        running.run(model, ["whole"], manager, limit=1, output=str(folder))


def test_an_option_of_the_model_that_there_is_not():
    with pytest.raises(NeoError, match=r"no option 'cache_dtyp'\. Did you mean 'cache_dtype'"):
        NeoLM(cache_dtyp="int8")


def test_what_begins_a_text_and_what_begins_nothing(lm):
    """Without a context the end of text is it; an empty text is certain; a prompt may be empty."""
    model = NeoLM(lm, cache="none")
    end = lm.tokenizer.eos_id
    ((logprob, _),) = model.loglikelihood([Asked("", "the fox")], disable_tqdm=True)
    (score,) = lm.score([[end, *lm.encode("the fox")]])
    assert logprob == pytest.approx(score.logprobs.sum(), rel=1e-5)
    assert model.loglikelihood_rolling([Asked("")], disable_tqdm=True) == [0.0]
    assert model.loglikelihood([], disable_tqdm=True) == []
    (text,) = model.generate_until([Asked("", {"max_gen_toks": 3})], disable_tqdm=True)
    (sample,) = lm.sample([[end]], 3, sampling=SamplingOptions(temperature=0.0, top_p=1.0))
    assert text == sample.text


def test_a_batch_size_that_is_none(lm):
    with pytest.raises(NeoError, match="the batch size 'many' is neither auto nor a whole number"):
        NeoLM(lm, cache="none", batch_size="many")


@pytest.mark.usefixtures("few_tasks")
def test_the_command_line_of_the_harness(checkpoints, tasks, tmp_path, monkeypatch, capsys):
    args = [
        "--model_args", f"pretrained={checkpoints['bytes']}", "--tasks", "choices",
        "--include_path", str(tasks), "--limit", "2", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["harness", *args])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert harness.main() == 0
    assert "|choices|" in capsys.readouterr().out
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "neo_jax"
    assert results["config"]["model_dtype"] == "float32"
    assert (tmp_path / "neo_jax" / "answers.sqlite").is_file()
    monkeypatch.setattr(sys, "argv", ["harness", "run", "--model_args", "mesh=x", *args[2:]])
    assert harness.main() == 1
    assert capsys.readouterr().err.endswith("\n")
