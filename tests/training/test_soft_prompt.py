"""Training of a soft prompt: whole runs, in front of plain text and of pairs."""

import dataclasses
import json
import re
import warnings
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax.checkpoints.prefix_mapper import describe_mapper
from neo_jax.config import ModelConfig
from neo_jax.data.packing import TokenDataset
from neo_jax.data.prepare import prepare
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.text.prefixes import with_features
from neo_jax.training.loop import train
from neo_jax.transforms.lora import LoraConfig
from neo_jax.transforms.soft_prompt import SoftPromptConfig, first_words

SOFT = SoftPromptConfig(tokens=4)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, tokenizer_folders):
    root = tmp_path_factory.mktemp("pairs")
    lines = [{"prompt": f"{i} fox", "completion": " and the dog" * (1 + i % 2)} for i in range(60)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([root / "pairs.jsonl"], root / "data", tokenizer_folders["pieces"], held_out=0.1)
    return root / "data"


@pytest.fixture
def tuning(config, checkpoints):
    optimizer = dataclasses.replace(config.optimizer, learning_rate=3e-2, clip_norm=0.0)
    return dataclasses.replace(
        config, model=ModelConfig(), pretrained=str(checkpoints["pieces"]), soft_prompt=SOFT,
        length=32, optimizer=optimizer,
    )  # fmt: skip


def losses(config, name="loss"):
    lines = map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def test_a_run_learns_and_leaves_an_adapter(tuning, pairs, checkpoints):
    config = dataclasses.replace(
        tuning, data=str(pairs), steps=40, save_every=40, eval_every=20, prompts=("1 fox",),
        sample_tokens=5,
    )  # fmt: skip
    state = train(config)
    found = losses(config)
    assert found[-1] < found[0] - 0.5
    held_out = losses(config, "eval_loss")
    assert held_out[1] < held_out[0]
    assert jax.tree.map(np.shape, state.params) == {PROMPT: (4, 32)}
    output = Path(config.output)
    assert not (output / "model").exists()
    lm, base = neo_jax.load(output), neo_jax.load(checkpoints["pieces"])
    np.testing.assert_array_equal(lm.params[PROMPT], state.params[PROMPT])
    for name in base.params:  # which was frozen
        assert jax.tree.all(jax.tree.map(np.array_equal, lm.params[name], base.params[name]))
    samples = (output / "samples.jsonl").read_text().splitlines()
    assert lm.sample(["1 fox"], 5)[0].text == json.loads(samples[-1])["text"]
    assert score(lm) < score(base) - 0.5
    theirs = GPTNeoForCausalLM.from_pretrained(checkpoints["pieces"], attn_implementation="eager")
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(theirs, output / "adapter").eval()
    ids = torch.tensor([lm.encode("1 fox and the dog")])
    with torch.no_grad():
        logits = theirs(ids).logits.log_softmax(-1)[0, 3:].numpy()
    expected = [row[token] for row, token in zip(logits[1:], ids[0, 1:], strict=False)]
    np.testing.assert_allclose(lm.score("1 fox and the dog").logprobs, expected, atol=1e-4)


def score(lm):
    return lm.score("7 fox and the dog and the dog").loss


def test_an_interrupted_run_goes_on_to_the_same_bits(tuning, tmp_path):
    optimizer = dataclasses.replace(tuning.optimizer, schedule="constant")
    config = dataclasses.replace(tuning, optimizer=optimizer, accumulation=2)
    whole = train(config)
    first = dataclasses.replace(config, output=str(tmp_path / "two"), steps=3)
    train(first)
    again = train(dataclasses.replace(first, steps=6))
    np.testing.assert_array_equal(whole.params[PROMPT], again.params[PROMPT])
    other = dataclasses.replace(first, soft_prompt=SoftPromptConfig(tokens=3))
    with pytest.raises(NeoError, match=r"another soft prompt \(soft_prompt.tokens 4 -> 3"):
        train(other)


MESH = {
    "mesh": "data=2,fsdp=2,model=2",
    "rules": "embed:fsdp,heads:model,mlp:model,vocab:model",
}


def compare_on_a_mesh(config, output):
    """Adam makes much of little: gradients are compared before the first update, at step 3."""
    train(dataclasses.replace(config, steps=3, **MESH))
    one = dataclasses.replace(config, steps=3, output=str(output))
    train(one)
    np.testing.assert_allclose(losses(config), losses(one), rtol=1e-5)
    norms = losses(config, "gradient_norm"), losses(one, "gradient_norm")
    np.testing.assert_allclose(norms[0][:2], norms[1][:2], rtol=1e-5)


def test_on_a_mesh(tuning, tmp_path):
    compare_on_a_mesh(tuning, tmp_path / "one")


def test_it_begins_as_words(tuning, checkpoints):
    optimizer = dataclasses.replace(tuning.optimizer, learning_rate=0.0)
    soft = SoftPromptConfig(tokens=9, init_text="The fox")
    config = dataclasses.replace(tuning, steps=1, optimizer=optimizer, soft_prompt=soft)
    found = train(config).params[PROMPT]
    base = neo_jax.load(checkpoints["pieces"])
    words = base.encode("The fox")
    assert 1 < len(words) < 9
    table = np.asarray(base.params["wte"]["embedding"])
    np.testing.assert_array_equal(found, table[np.resize(words, 9)])
    drawn = first_words(50, [], 327, seed=1)
    assert drawn.max() < 327
    assert len(set(drawn.tolist())) > 30
    assert first_words(2, [8, 9, 10], 327, 0).tolist() == [8, 9]


def test_every_pair_is_behind_the_prompt(pairs):
    plain = TokenDataset.open(pairs, length=40)
    soft = TokenDataset.open(pairs, length=40, soft_prompt=range(400, 404))
    rows = [soft.sequence(i) for i in range(soft.num_sequences)]
    tokens = np.concatenate([row["tokens"] for row in rows])
    assert (tokens == 400).sum() == plain.num_documents
    assert soft.num_sequences > plain.num_sequences
    weights = sum(row["weights"].sum() for row in rows)
    assert weights == sum(plain.sequence(i)["weights"].sum() for i in range(plain.num_sequences))
    for row in rows:
        counted = row["tokens"][1:][row["weights"] > 0]
        assert counted.max() < 400
        starts = np.flatnonzero(row["tokens"] == 400)
        assert set(row["segment_starts"][row["weights"] > 0]) <= set(starts)
        for start in starts:
            assert row["tokens"][start : start + 4].tolist() == [400, 401, 402, 403]


def test_every_sequence_is_behind_the_prompt(dataset):
    plain = TokenDataset.open(dataset, length=16)
    soft = TokenDataset.open(dataset, length=20, soft_prompt=range(400, 404))
    assert soft.num_sequences == plain.num_sequences
    for i in (0, 3, plain.num_sequences - 1):
        mine, other = soft.sequence(i), plain.sequence(i)
        assert mine["tokens"][:4].tolist() == [400, 401, 402, 403]
        np.testing.assert_array_equal(mine["tokens"][4:], other["tokens"])
        np.testing.assert_array_equal(mine["weights"], [*[0] * 4, *other["weights"]])
        assert not mine["segment_starts"].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pretrained": ""}, "soft_prompt.tokens are read before a model's texts; name it in pre"),
        ({"new_tokens": 2}, "would never be learned; set lora.rank and soft_prompt.tokens, or new"),
        (
            {"lora": LoraConfig(rank=2)},
            "lora.rank and soft_prompt.tokens are two adapters; set",
        ),
        ({"length": 4}, "soft_prompt.tokens 4 leave a sequence of 4 no room for a text; take"),
        (
            {"across_documents": False},
            "documents that are kept apart would not see it; leave",
        ),
    ],
)
def test_what_cannot_be(tuning, fields, message):
    with pytest.raises(NeoError) as error:
        train(dataclasses.replace(tuning, **fields))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_text": "a"}, "soft_prompt.init_text goes with soft_prompt.tokens"),
        ({"features": "a.npy"}, "soft_prompt.features goes with soft_prompt.tokens"),
        ({"tokens": -1}, "soft_prompt.tokens must be 0"),
        ({"tokens": 2, "hidden": 3}, "soft_prompt.hidden is of what maps soft_prompt.features"),
        ({"tokens": 2, "features": "a.npy", "init_text": "a"}, "begins as no text; leave init_tex"),
    ],
)
def test_options_that_go_with_others(fields, message):
    with pytest.raises(NeoError, match=re.escape(message)):
        SoftPromptConfig(**fields)


ANSWERS = (" the dog", " naïve café", " Ishmael", " $3.45")


@pytest.fixture(scope="module")
def captions(tmp_path_factory, tokenizer_folders):
    """Pairs whose features say what their completions are, and the features."""
    root = tmp_path_factory.mktemp("captions")
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, len(ANSWERS), 64)
    lines = [{"prompt": "fox", "completion": ANSWERS[kind]} for kind in kinds]
    (root / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([root / "captions.jsonl"], root / "data", tokenizer_folders["pieces"])
    features = np.eye(len(ANSWERS))[kinds] + rng.normal(size=(64, len(ANSWERS))) / 20
    np.save(root / "features.npy", features.astype(np.float16))
    return root, features, kinds


@pytest.fixture
def mapping(tuning, captions):
    root = captions[0]
    soft = SoftPromptConfig(tokens=3, features=str(root / "features.npy"), hidden=6)
    return dataclasses.replace(tuning, data=str(root / "data"), soft_prompt=soft, length=16)


@pytest.fixture(scope="module")
def confident(checkpoints, tmp_path_factory):
    """A folder of a model whose logits are far apart: what is frozen must be able to be sure."""
    lm = neo_jax.load(checkpoints["pieces"])
    lm.params["ln_f"] = {**lm.params["ln_f"], "scale": 8 * lm.params["ln_f"]["scale"]}
    lm.save_pretrained(tmp_path_factory.mktemp("confident"))
    return str(tmp_path_factory.getbasetemp() / "confident0")


def test_a_mapper_learns_what_features_say(mapping, captions, confident):
    config = dataclasses.replace(
        mapping, steps=150, save_every=150, batch_size=16, pretrained=confident
    )
    train(config)
    output = Path(config.output) / "adapter"
    assert losses(config)[-1] < losses(config)[0] / 3
    lm = neo_jax.load(config.output)
    assert lm.folder == output
    assert describe_mapper(output)["hidden"] == 6
    _, features, kinds = captions
    firsts = [np.flatnonzero(kinds == kind)[0] for kind in range(len(ANSWERS))]
    texts = [f"fox{answer}" for answer in ANSWERS]

    def loss(rows):
        known, prompts = with_features(lm, rows, texts)
        return np.mean([score.loss for score in known.score(prompts)])

    right = loss(features[firsts])
    for turn in range(1, len(ANSWERS)):
        assert right < loss(np.roll(features[firsts], turn, axis=0)) - 0.5
    fields = json.loads((output / "adapter_config.json").read_text())
    (output / "adapter_config.json").write_text(json.dumps(fields | {"num_features": 5}))
    with pytest.raises(
        NeoError, match=r"hidden.kernel is float32 \[6, 4\], not of floats \[6, 5\]"
    ):
        neo_jax.load(config.output)


def test_a_mapper_on_a_mesh(mapping, tmp_path):
    compare_on_a_mesh(mapping, tmp_path / "one")


def test_a_mapper_goes_on_to_the_same_bits(mapping, tmp_path):
    schedule = dataclasses.replace(mapping.optimizer, schedule="constant", warmup_steps=1)
    config = dataclasses.replace(mapping, steps=4, optimizer=schedule, accumulation=2)
    whole = train(config)
    first = dataclasses.replace(config, output=str(tmp_path / "two"), steps=2)
    train(first)
    again = train(dataclasses.replace(first, steps=4))
    jax.tree.map(np.testing.assert_array_equal, whole.params, again.params)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((63, 4)), "has 63 rows, and "),
        (np.zeros((64, 4, 2)), "has the shape [64, 4, 2]; give a row of features for each"),
        (
            np.where(np.arange(256).reshape(64, 4) == 9, np.nan, 0),
            "row 2 holds numbers that are not",
        ),
        (np.full((64, 4), "a"), "holds <U1, no numbers; save features as float32"),
        (None, "no such file; give a .npy file"),
        (b"1,2\n", "features.npy is no .npy file of numbers; write one with numpy.save"),
    ],
)
def test_features_that_cannot_be(mapping, tmp_path, features, message):
    file = tmp_path / "features.npy"
    if isinstance(features, bytes):
        file.write_bytes(features)
    elif features is not None:
        np.save(file, features)
    soft = dataclasses.replace(mapping.soft_prompt, features=str(file))
    with pytest.raises(NeoError) as error:
        train(dataclasses.replace(mapping, soft_prompt=soft))
    assert message in str(error.value)


def test_features_are_of_pairs(mapping, dataset):
    with pytest.raises(NeoError, match="are of the pairs of one data set; name one in data"):
        train(dataclasses.replace(mapping, data=str(dataset)))
    with pytest.raises(NeoError, match="prompts have no features to be mapped; leave prompts out"):
        train(dataclasses.replace(mapping, prompts=("fox",)))
