"""configs/: the arithmetic of published sizes, and the examples of pairs from end to end."""

import dataclasses
import json
from pathlib import Path

import pytest

import neo_jax
from neo_jax.axes import BATCH, LENGTH
from neo_jax.cli.train import load_config
from neo_jax.config import PRESETS, preset
from neo_jax.data.prepare import prepare
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding, tree_shardings
from neo_jax.training.loop import train


@pytest.mark.parametrize(
    ("name", "size", "tokens", "devices"),
    [
        ("gpt-neo-125m", 125_198_592, 300e9, 16),
        ("gpt-neo-1.3b", 1_315_575_808, 380e9, 256),
        ("gpt-neo-2.7b", 2_651_307_520, 420e9, 256),
        ("finetune-125m", 125_198_592, 1.6e6, 1),
        ("finetune-1.3b", 1_315_575_808, 33e6, 8),
        ("gpt-neo-1.3b-8k", 1_315_575_808 + 6144 * 2048, 65e6, 8),
        ("lora-2.7b", 2_651_307_520, 16e6, 1),
    ],
)
def test_the_arithmetic_of_a_published_size(name, size, tokens, devices):
    config = load_config(name)
    model = config.model
    if config.pretrained:
        published = config.pretrained.partition("/")[2].lower()
        assert published in PRESETS
        model = preset(published)
        if config.model.max_length > model.max_length:
            model = dataclasses.replace(model, max_length=config.model.max_length)
    assert model.num_params == size
    length = config.length or model.max_length
    assert config.steps * config.batch_size * length == pytest.approx(tokens, rel=0.03)
    sharding = make_sharding(config.mesh, config.rules, devices=devices)
    if sharding is None:
        assert devices == 1
        return
    part = config.batch_size // config.accumulation
    assert sharding.num_shards(BATCH) * sharding.num_shards(LENGTH) == devices
    sharding.spec((BATCH, None), (part, length), "batch")  # raises where it does not divide
    neo = Neo(model, sharding=sharding)
    shapes = param_shapes(neo)
    tree_shardings(sharding, logical_axes(neo), shapes)


PAIRS = [{"prompt": f"Question: {i}?\nAnswer:", "completion": f" It is {i}."} for i in range(24)]


@pytest.mark.parametrize("name", ["summaries", "translation", "questions", "instructions"])
def test_the_examples_of_pairs_run(name, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    tokenizer = Path(neo_jax.__file__).parent / "bundled"
    prepare([tmp_path / "pairs.jsonl"], tmp_path / "data", tokenizer, held_out=0.2)
    config = dataclasses.replace(
        load_config(name),
        data=str(tmp_path / "data"),
        output=str(tmp_path / "run"),
        steps=3,
        batch_size=2,
        length=32,
    )
    assert config.pretrained == "bundled"
    assert int(train(config).step) == 3
    folder = "adapter" if config.lora.rank else "model"
    assert neo_jax.load(tmp_path / "run" / folder).generate(PAIRS[0]["prompt"], 4)
