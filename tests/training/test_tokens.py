"""Labels of words, and answers, from files to what a trained model says, as in transformers."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers

import neo_jax
from neo_jax.cli import main
from neo_jax.data.examples import Schema
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.text.spans import join_question
from neo_jax.training.loop import train
from neo_jax.training.metrics import measure_answers, measure_words
from neo_jax.transforms.lora import LoraConfig


@pytest.fixture(scope="module")
def rows(text):
    """Sentences with an animal, by kind: its words with tags, and a question whose answer it is.

    Every fourth question has none. Contexts are longer than the windows in which they are read.
    """
    rng = np.random.default_rng(0)
    words = [word for word in text.split() if word[:3] not in ("fox", "dog")]
    words = [word for word in words if word.isascii()]
    found = {"classifier": [], "qa_outputs": []}
    for i in range(270):
        chosen, animal = rng.choice(words, 4).tolist(), str(rng.choice(["dog", "fox"]))
        place = int(rng.integers(1, 4))
        chosen.insert(place, animal)
        tags = ["B-A" if word == animal else "O" for word in chosen]
        found["classifier"].append({"tokens": chosen, "tags": tags})
        answers = {"text": [animal], "answer_start": [len(" ".join(chosen[:place])) + 1]}
        said = chosen + words[i % 50 :][:6]
        if i % 4 == 0:
            said[place], answers = "cat", {"text": [], "answer_start": []}
        row = {"question": "dog or fox?", "context": " ".join(said), "answers": answers}
        found["qa_outputs"].append(row)
    return found


@pytest.fixture
def config(rows, six_epochs, tokenizer_folders, tmp_path):
    """Of a head: a run on such sentences; the last 30 are held out."""

    def make(kind):
        lines = [json.dumps(row) + "\n" for row in rows[kind]]
        for name, part in (("train", lines[:240]), ("dev", lines[240:])):
            (tmp_path / f"{name}.jsonl").write_text("".join(part))
        data, files = tmp_path / "data", [tmp_path / "train.jsonl"]
        prepare_labelled(
            files, data, tokenizer_folders["bytes"], Schema.usual(kind),
            held_out_inputs=[tmp_path / "dev.jsonl"],
        )  # fmt: skip
        return six_epochs(data, length=48)

    return make


def best(config):
    """The metrics of the best epoch."""
    output = Path(config.output)
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    step = json.loads((output / "best.json").read_text())["step"]
    (found,) = [line for line in lines if line["step"] == step and "eval_loss" in line]
    return {name.removeprefix("eval_"): value for name, value in found.items()}


def test_a_classifier_of_words(config, rows, capsys):
    """All weights; the best epoch is what is left, and transformers gives the same."""
    config = config("classifier")
    train(config)
    held_out = rows["classifier"][240:]
    score = best(config)["entity_f1"]
    assert score > 0.9
    lm = neo_jax.load(config.output)
    assert lm.config.head == HeadConfig("classifier", ("B-A", "O"))
    found = lm.classify_tokens([row["tokens"] for row in held_out])
    assert lm.classify_tokens([" ".join(row["tokens"]) for row in held_out]) == found
    number = {label: i for i, label in enumerate(lm.config.head.labels)}
    pairs = [
        (np.array([number[tag] for tag in row["tags"]]), np.array([number[w.label] for w in text]))
        for row, text in zip(held_out, found, strict=True)
    ]
    again = measure_words(("entity_f1", "accuracy"), pairs, lm.config.head)
    assert again["entity_f1"] == pytest.approx(score)
    assert again["accuracy"] == pytest.approx(best(config)["accuracy"])

    theirs = transformers.AutoModelForTokenClassification.from_pretrained(
        Path(config.output) / "model"
    )
    assert theirs.config.id2label == {0: "B-A", 1: "O"}
    tokens = held_out[0]["tokens"]
    ids = lm.encode(" ".join(tokens))
    with torch.no_grad():
        shares = theirs(torch.tensor([ids])).logits[0].softmax(-1).numpy()
    for i, (word, label, probability) in enumerate(found[0]):
        assert word == tokens[i]
        first = len(lm.encode(" ".join(tokens[:i]))) if i else 0  # as this tokenizer joins words
        assert probability == pytest.approx(shares[first].max(), abs=1e-5)
        assert label == theirs.config.id2label[int(shares[first].argmax())]
    # It goes on from here with its own head, also where that says another dropout.
    file = Path(config.output) / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"classifier_dropout": 0.3}))
    again = dataclasses.replace(
        config, pretrained=config.output, output=f"{config.output}-2", steps=1, epochs=0,
        optimizer=dataclasses.replace(config.optimizer, learning_rate=0.0),
    )  # fmt: skip
    train(again)
    assert best(again)["entity_f1"] == pytest.approx(score)
    with pytest.raises(
        NeoError, match=r"is called 'f1'\. Known are: accuracy, entity_f1, macro_f1"
    ):
        train(dataclasses.replace(config, metric="f1"))
    with pytest.raises(NeoError, match="' ' is no word; give a text, or a list of words"):
        lm.classify_tokens([["The", " "]])
    capsys.readouterr()
    assert main(["classify", " ".join(tokens), "--model", config.output, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["words"]
    assert [(each["word"], each["label"]) for each in said] == [each[:2] for each in found[0]]
    assert main(["classify", "a dog", "--model", config.output]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a", "dog"]
    train(dataclasses.replace(again, output=f"{config.output}-3", length=8))
    assert "labels of words of train are beyond length 8, and not read" in capsys.readouterr().err


def test_answers_by_adapters_on_a_mesh(config, rows, capsys):
    config = dataclasses.replace(
        config("qa_outputs"), lora=LoraConfig(rank=4), mesh="fsdp=2,model=2", epochs=3, length=24
    )  # fmt: skip
    config = dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e-2)
    )
    train(config)
    score, held_out = best(config), rows["qa_outputs"][240:]
    assert score["squad_f1"] > 0.9
    output = Path(config.output)
    pairs = [(row["question"], row["context"]) for row in held_out]
    said = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (said["task_type"], said["modules_to_save"]) == ("QUESTION_ANS", ["qa_outputs"])
    for name in ("adapter", "model"):
        lm = neo_jax.load(output / name)
        assert all(each.text for each in lm.answers(pairs[1:4], length=config.length))
        found = lm.answers(pairs, length=config.length, allow_none=True)
        for answer, (_, context) in zip(found, pairs, strict=True):
            assert context[answer.start : answer.end] == answer.text
            assert 0 < answer.probability <= 1
        references = [row["answers"]["text"] or [""] for row in held_out]
        texts = [answer.text for answer in found]
        again = measure_answers(("squad_f1", "squad_em"), references, texts)
        assert again == {each: pytest.approx(score[each]) for each in again}
        assert lm.answer(*pairs[1], length=config.length).text == found[1].text

    # transformers, and PEFT on the model below, have the same logits.
    question, context = pairs[1]
    ids, answer = lm.encode(join_question(question, context)[0]), lm.answer(question, context)
    load = transformers.AutoModelForQuestionAnswering.from_pretrained
    merged = load(output / "model")
    wrapped = peft.PeftModel.from_pretrained(load(config.pretrained), output / "adapter")
    with torch.no_grad():
        one, other = (model.eval()(torch.tensor([ids])) for model in (merged, wrapped))
    for name in ("start_logits", "end_logits"):
        np.testing.assert_allclose(one[name], other[name], rtol=0, atol=1e-4)
    spans = one.start_logits[0].softmax(-1).argmax(), one.end_logits[0].argmax()
    assert lm.tokenizer.decode(ids[spans[0] : spans[1] + 1]).strip() == answer.text
    with pytest.raises(NeoError, match="a context is ''; give a text"):
        lm.answer("Who?", "")
    with pytest.raises(NeoError, match="which leaves no room for its context among the 64 that"):
        lm.answer("Who? " * 40, "The fox.")
    asked = ["classify", question, "--model", config.output]
    assert main([*asked, "--context", context]) == 0
    assert capsys.readouterr().out.split()[0] == answer.text
    without = ["--allow-none", "--length", str(config.length), "--context", pairs[0][1]]
    assert main([*asked, *without]) == 0
    assert capsys.readouterr().out.split()[:2] == ["(no", "answer)"]
    assert main([*asked, "--allow-none"]) == 2
    assert "--allow-none has no effect without --context" in capsys.readouterr().err
    assert main(asked) == 1
    assert "name the text that has them with --context" in capsys.readouterr().err
