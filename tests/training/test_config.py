"""configs/: every one loads, and its model fits the data it names."""

import dataclasses
import re
from pathlib import Path

import pytest

from neo_jax.cli.train import load_config, names
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.training.config import OptimizerConfig, TrainConfig

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("[!_]*.py"))


def test_there_are_configs_and_all_havenames():
    assert "bundled" in names()
    assert [re.sub("[-.]", "_", name) for name in names()] == [path.stem for path in FILES]


@pytest.mark.parametrize(("name", "path"), list(zip(names(), FILES, strict=True)), ids=names())
def test_a_config_loads_and_says_how_it_is_run(name, path):
    config = load_config(str(path))
    assert load_config(name) == load_config(path.stem) == config
    assert 0 < config.sequence_length <= config.model.max_length
    assert config.optimizer.warmup_steps < (config.steps or 10 * config.epochs)
    assert 0 <= config.model.eos_token_id < config.model.vocab_size
    assert name in config.output
    source = path.read_text()
    if "\nrecipe = " in source:  # which makes its data
        assert f"neo-jax recipe {name}\n" in source
    else:
        assert f"neo-jax train {name}\n" in source
        assert config.data in source.split('"""')[1]  # the docstring says where it comes from
    for word in ("\ncost ", "\nexpected "):
        assert word in source


def test_the_length_is_the_context_unless_it_is_said():
    config = TrainConfig("data", "run", 1, 1, model=ModelConfig(max_length=100))
    assert config.sequence_length == 100
    assert dataclasses.replace(config, length=40).sequence_length == 40


@pytest.mark.parametrize("name", ["steps", "batch_size", "log_every", "save_every", "keep"])
def test_counts_are_positive(name):
    config = TrainConfig("data", "run", 1, 1)
    for value in (0, -1):
        with pytest.raises(NeoError, match=f"{name} must be at least 1, not {value}"):
            dataclasses.replace(config, **{name: value})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"learning_rate": -1e-4}, "optimizer.learning_rate must be 0 or more, not -0.0001"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay must be 0 or more, not nan"),
        ({"beta2": 1.0}, "optimizer.beta2 must be at least 0 and below 1, not 1.0"),
        ({"epsilon": 0}, "optimizer.epsilon must be above 0, not 0.0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, not 'fast'"),
    ],
)
def test_an_optimizer_that_cannot_be(field, message):
    with pytest.raises(NeoError, match=re.escape(message)):
        OptimizerConfig(**field)
    assert OptimizerConfig(learning_rate=1).learning_rate == 1.0
