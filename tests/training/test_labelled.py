"""A classifier from examples with labels to labels: trained, saved, loaded, as in transformers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import neo_jax
from neo_jax.cli import main
from neo_jax.data.labelled import LabelledDataset
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.errors import NeoError
from neo_jax.training.config import TrainConfig
from neo_jax.training.labelled import is_exhausted, open_split, with_labels
from neo_jax.training.loop import train
from neo_jax.transforms.lora import LoraConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer_folders, text):
    """Texts that end with a fox or a dog."""
    folder, rng = tmp_path_factory.mktemp("labelled"), np.random.default_rng(0)
    words, lines = [w for w in text.split() if w[:3] not in ("fox", "dog")], ["text\tlabel"]
    for _ in range(96):
        animal = rng.choice(["dog", "fox"])
        chosen = [*rng.choice(words, rng.integers(1, 6)), animal]
        lines.append(f"{' '.join(chosen)}\t{animal}")
    (folder / "all.tsv").write_text("\n".join(lines), encoding="utf-8")
    prepare_labelled(
        [folder / "all.tsv"], folder / "data", tokenizer_folders["bytes"], held_out=0.25
    )
    return folder / "data"


@pytest.fixture
def config(data, six_epochs):
    return six_epochs(data, length=32)


def lines(run):
    return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def held_out(data):
    dataset = LabelledDataset.open(data, "held_out", 32)
    ids = np.split(dataset.tokens, dataset.offsets[1:-1])
    return [row.tolist() for row in ids], dataset.labels


def accuracy(lm, held_out):
    ids, labels = held_out
    found = [lm.config.head.labels.index(each.label) for each in lm.classify(ids)]
    return np.mean(found == labels)


def test_a_classifier_is_trained_saved_and_used(config, held_out, capsys):
    """The best epoch is what is left; transformers gives the same."""
    train(config)
    output = Path(config.output)
    best = json.loads((output / "best.json").read_text())
    evaluations = {line["step"]: line for line in lines(output) if "eval_accuracy" in line}
    assert len(evaluations) == 6
    assert best["accuracy"] == pytest.approx(max(e["eval_accuracy"] for e in evaluations.values()))
    assert best["accuracy"] > 0.9
    lm = neo_jax.load(output)
    assert lm.config.head.labels == ("dog", "fox")
    assert accuracy(lm, held_out) == pytest.approx(best["accuracy"])

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert theirs.config.id2label == {0: "dog", 1: "fox"}
    ids, found = held_out[0], lm.classify(held_out[0])
    for row, each in zip(ids[:6], found[:6], strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([row])).logits[0].numpy()
        np.testing.assert_allclose(each.logits, logits, rtol=0, atol=1e-4)
        np.testing.assert_allclose(each.probabilities.sum(), 1, rtol=1e-6)
    for batch_size in (1, 32):
        again = lm.classify(ids, batch_size)
        assert [each.label for each in again] == [each.label for each in found]
        np.testing.assert_allclose(
            [each.logits for each in again], [each.logits for each in found], rtol=0, atol=1e-5
        )
    split = neo_jax.load(output, mesh="data=2,fsdp=2,model=2").classify(ids)
    np.testing.assert_allclose(
        [each.logits for each in split], [each.logits for each in found], rtol=0, atol=1e-5
    )
    # It is no language model, and says so.
    with pytest.raises(NeoError, match="the model is a classifier, with a head score: it neither"):
        lm.generate("The fox")
    with pytest.raises(NeoError, match="use classify, or load the model that it was made of"):
        lm.score("The fox")
    assert main(["classify", "the quick fox", "--model", str(output), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["label"] == lm.classify("the quick fox").label
    assert sum(said["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_adapters_on_a_mesh(config, held_out, monkeypatch):
    """Trained with the head in whole, in PEFT's format; evaluations stop when none is better."""
    opened, open_set = [], LabelledDataset.open.__func__

    def watched(kind, folder, split, length):
        opened.append(split)
        return open_set(kind, folder, split, length)

    monkeypatch.setattr(LabelledDataset, "open", classmethod(watched))
    config = dataclasses.replace(
        config, lora=LoraConfig(rank=4), mesh="fsdp=2,model=2", epochs=20, patience=1,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2),
    )  # fmt: skip
    state = train(config)
    assert opened == ["train", "held_out"]
    output = Path(config.output)
    steps = with_labels(config, open_split(config, "train")).eval_every
    best = json.loads((output / "best.json").read_text())
    assert int(state.step) == best["step"] + steps < 20 * steps
    assert int(train(config).step) == int(state.step)  # it has ended
    for name in ("adapter", "model"):
        lm = neo_jax.load(output / name)
        assert lm.config.head.labels == ("dog", "fox")
        assert accuracy(lm, held_out) == pytest.approx(best["accuracy"])
    said = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (said["task_type"], said["modules_to_save"]) == ("SEQ_CLS", ["score"])


def test_what_is_wrong_with_a_run_is_one_line(config, checkpoints):
    for change, message in (
        ({"prompts": ("a",)}, "a classifier continues no prompts"),
        ({"metric": "acuracy"}, "no metric is called 'acuracy'. Did you mean 'accuracy'?"),
    ):
        with pytest.raises(NeoError) as error:
            train(dataclasses.replace(config, **change))
        assert message in str(error.value)
    lm = neo_jax.load(checkpoints["bytes"])
    with pytest.raises(NeoError, match="this is a language model, not a classifier of texts"):
        lm.classify("a")


def test_patience():
    config = TrainConfig("", "", 100, 1, patience=2, eval_every=10)
    assert [is_exhausted(config, step, 10) for step in (10, 20, 30, 40)] == [0, 0, 1, 1]
    assert not is_exhausted(config, 30, 0)
    assert not is_exhausted(dataclasses.replace(config, patience=0), 90, 10)
