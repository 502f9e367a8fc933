"""neo-jax score."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import neo_jax
from neo_jax.checkpoints.prefix_mapper import save_mapper
from neo_jax.checkpoints.prompt_tuning import save_soft_prompt
from neo_jax.decode.options import SamplingOptions


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


def greedy_ids(lm, prompt):
    return lm.sample([prompt], 4, sampling=SamplingOptions(temperature=0.0))[0].ids


def test_a_mapper_and_a_soft_prompt(succeed, fail, lm, checkpoints, tmp_path):
    """What `train --soft-prompt...` leaves is named as other models are."""
    base, soft, mapped = str(checkpoints["pieces"]), tmp_path / "soft", tmp_path / "mapped"
    table = lm.params["wte"]["embedding"][np.array([[5, 80, 41], [300, 7, 7]])]
    save_soft_prompt(soft, lm.config, table[0], base=base)
    # Whose embeddings are the table's rows: the features say which.
    kernel = np.moveaxis(np.asarray(table), 0, -1)
    mapper = {"out": {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((3, 32))}}
    save_mapper(mapped, lm.config, mapper, base=base)
    features, texts = tmp_path / "features.npy", tmp_path / "texts.txt"
    np.save(features, np.eye(2))
    texts.write_text("The quick\nbrown fox\n")
    given = ["--model", mapped, "--features", features]
    lines = succeed("score", "--input", texts, *given).splitlines()
    prefixes = [[5, 80, 41], [300, 7, 7]]
    for line, prefix, text in zip(
        map(json.loads, lines), prefixes, ["The quick", "brown fox"], strict=True
    ):
        assert line["ids"] == lm.encode(text)
        (score,) = lm.score([[*prefix, *line["ids"]]])
        np.testing.assert_allclose(line["logprobs"], score.logprobs[2:], atol=1e-5)
    greedy = ["--temperature", 0, "--max-new-tokens", 4]
    written = succeed("generate", "The", *greedy, "--json", *given).splitlines()
    for line, prefix in zip(map(json.loads, written), prefixes, strict=True):
        assert line["prompt"] == "The"
        assert line["ids"] == greedy_ids(lm, [*prefix, *lm.encode("The")])
    shown = succeed("generate", "The", *greedy, *given).splitlines()
    assert shown[0].startswith("The")
    alone = json.loads(succeed("generate", "The", *greedy, "--json", "--model", soft))
    assert alone["ids"] == json.loads(written[0])["ids"]
    found = json.loads(succeed("info", mapped, "--json"))
    assert (found["kind"], found["features"], found["virtual_tokens"]) == ("PREFIX_MAPPER", 2, 3)
    assert json.loads(succeed("info", soft, "--json"))["parameters"] == 96
    texts.write_text("a\nb\nc\n")
    message = fail("score", "--input", texts, *given)
    assert "features.npy has 2 rows, for 3 texts; give one for each" in message
    message = fail("generate", "The", "--model", base, "--features", features)
    assert message.startswith("the model maps no features; load what a run with")
