"""neo-jax score."""

import json

import numpy as np
import pytest

import neo_jax


@pytest.fixture
def model(checkpoints):
    return ["--model", checkpoints["pieces"]]


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["pieces"])


@pytest.mark.parametrize("stride", [0, 8])
def test_texts_in_and_a_line_for_each_out(run, model, lm, text, tmp_path, stride):
    texts = [lm.encode("Call me"), "The quick brown fox", text, "naïve 日本", [3]]
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t} if isinstance(t, str) else {"ids": t}) + "\n" for t in texts)
    )
    status, out, err = run("score", "--input", path, "--output", output, "--stride", stride, *model)
    assert (status, out) == (0, "")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    scores = lm.score(texts, stride)
    tokens = sum(len(score.logprobs) for score in scores)
    nats = -sum(float(score.logprobs.sum(dtype=np.float64)) for score in scores)
    size = sum(score.num_bytes for score in scores)
    assert err == (
        f"5 texts, {tokens} scored tokens, loss {nats / tokens:.4f} nats a token, "
        f"{nats / np.log(2) / size:.4f} bits a byte over {size} bytes; "
        f"context 64, stride {stride or 32}\n"
    )
    for line, score in zip(found, scores, strict=True):
        assert list(line) == ["ids", "logprobs", "loss", "bits_per_byte"]
        assert line["ids"] == score.ids
        assert len(line["logprobs"]) == len(line["ids"]) - 1
        np.testing.assert_allclose(line["logprobs"], score.logprobs, rtol=0, atol=1e-5)
    for line, score in list(zip(found, scores, strict=True))[:-1]:
        assert line["loss"] == pytest.approx(score.loss, rel=1e-5)
        assert line["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert found[-1] == {"ids": [3], "logprobs": [], "loss": None, "bits_per_byte": None}


def test_a_text_file_to_stdout(run, model, lm, tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("The fox\n\nsails\n")
    status, out, err = run("score", "--input", path, *model)
    assert status == 0
    assert [json.loads(line)["ids"] for line in out.splitlines()] == [
        lm.encode("The fox"),
        lm.encode("sails"),
    ]
    assert err.startswith("2 texts, ")
    assert run("score", "--input", path, "--json", *model) == (0, out, err)


def test_ids_without_a_tokenizer(run, fail, checkpoints, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"ids": [1, 2, 3]}\n')
    status, out, err = run("score", "--input", path, "--model", checkpoints["bare"])
    assert status == 0
    assert len(json.loads(out)["logprobs"]) == 2
    assert json.loads(out)["bits_per_byte"] is None
    assert "bits a byte" not in err
    path.write_text('{"text": "hi"}\n')
    message = fail("score", "--input", path, "--model", checkpoints["bare"])
    assert "holds no tokenizer" in message


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ('{"text": "hi"}', ["--stride", "65"], "the stride must lie between 1 and 64, not 65"),
        ('{"ids": [1, 2]}\n{"ids": [1, 327]}', [], "text 2 has a token id outside the vocabulary"),
        ('{"ids": []}', [], "the prompt is empty"),
        ('{"prompt": "hi"}', [], 'in.jsonl:1: expected {"text": "text"} or {"ids": [1, 2, 3]}'),
        ("", [], "in.jsonl is empty; give a line for each text"),
        ('{"ids": [1, 2]}', ["--output", "/nowhere/out"], "cannot write /nowhere/out: No such"),
    ],
)
def test_texts_that_cannot_be_scored(fail, model, tmp_path, content, args, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    assert message in fail("score", "--input", path, *args, *model)


def test_an_input_that_is_not_there(fail, model):
    assert fail("score", "--input", "nowhere.jsonl", *model) == (
        "cannot read nowhere.jsonl: No such file or directory."
    )
