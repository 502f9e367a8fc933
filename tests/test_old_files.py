"""What version 0.1.0 left on disk is read, and gives what it gave: see fixtures/make.py."""

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from fixtures.make import environment

import neo_jax
from neo_jax.cli import main
from neo_jax.cli.train import load_config
from neo_jax.data.packing import TokenDataset
from neo_jax.evaluation.response_cache import Answers
from neo_jax.text.tokenizer import load_tokenizer
from neo_jax.training.loop import train

pytestmark = [pytest.mark.core, pytest.mark.optimized]  # compiled as what wrote them

FIXTURES = Path(__file__).parent / "fixtures"
RECORD = json.loads((FIXTURES / "written_by_0_1_0.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(FIXTURES / "written_by_0_1_0.tar.xz") as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)  # the names in its files are relative
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")


def losses(run):
    lines = map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_stopped_run_goes_on():
    config = load_config("config.py")
    expected = {int(step): loss for step, loss in RECORD["losses"].items()}
    before = losses("stopped")
    assert before == {step: expected[step] for step in range(1, 6)}
    assert json.loads(Path("stopped/best.json").read_text())["step"] == 5
    assert int(train(config).step) == 10
    assert losses("stopped") == pytest.approx(expected, rel=4e-6)  # of six digits
    assert {step: losses("stopped")[step] for step in before} == before
    written = hashlib.sha256(Path("stopped/model/model.safetensors").read_bytes()).hexdigest()
    # Elsewhere sums may have another order.
    assert written == RECORD["final"].get(environment(), written)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_data_set(split):
    dataset, expected = TokenDataset.open("data", split, 16), RECORD[split]
    assert dataset.num_tokens == expected["tokens"]
    assert dataset.num_documents == expected["documents"]
    assert dataset.num_bytes == expected["bytes"]
    assert np.asarray(dataset.tokens[:40]).tolist() == expected["first"]
    assert load_tokenizer("data").encode(RECORD["text"]) == RECORD["base"]["ids"]


@pytest.mark.parametrize("name", ["base", "adapted/model", "adapted/adapter", "int8"])
def test_a_model(name):
    lm, expected = neo_jax.load(name), RECORD[name]
    assert lm.encode(RECORD["text"]) == expected["ids"]
    assert lm.score([RECORD["text"]])[0].loss == pytest.approx(expected["loss"], rel=1e-6)
    text = lm.generate(RECORD["text"][:20], 12, temperature=0, no_repeat_ngram_size=1)
    assert text == expected["greedy"]


def test_an_interrupted_file_of_samples_goes_on(capsys):
    args = ["generate", "--model", "base", "--prompts-file", "prompts.txt"]
    assert main([*args, "--max-new-tokens", "8", "--output", "samples.jsonl"]) == 0
    if neo_jax.__version__ == RECORD["version"]:  # another version leaves the file alone
        assert "2/4 prompts are there; going on" in capsys.readouterr().err
        assert not list(Path().glob("samples.jsonl.partial-*"))
    found = list(map(json.loads, Path("samples.jsonl").read_text().splitlines()))
    for sample, expected in zip(found, RECORD["samples"], strict=True):
        logprobs = sample.pop("logprobs")
        assert logprobs == pytest.approx(expected["logprobs"], rel=1e-5, abs=1e-6)
        assert sample == {name: expected[name] for name in sample}
        assert sample.keys() | {"logprobs"} == expected.keys()


def test_the_answers_of_an_evaluation():
    assert len(RECORD["answers"]) >= 4
    for model, request, answer in RECORD["answers"]:
        answers = Answers(Path("answers.sqlite"), model)
        assert answers.find(request) == answer
        assert answers.find([*request, [0]]) is None
        answers.close()


def test_a_config_with_adapters_finds_its_names(tmp_path):
    """What configs imported in 0.1.0 is still there."""
    (tmp_path / "config.py").write_text(
        "from neo_jax.config import ModelConfig, preset\n"
        "from neo_jax.lora import LoraConfig\n"
        "from neo_jax.training.config import OptimizerConfig, TrainConfig\n"
        "config = TrainConfig('data', 'run', 10, 2, lora=LoraConfig(rank=4))\n"
    )
    assert load_config(str(tmp_path / "config.py")).lora.rank == 4
