"""The commands of a first hour, word for word: a text of one's own into a published model.

The hub is a folder: its library's own cache, with a model of GPT-Neo 125M's width and heads, but
two layers and a small vocabulary (benchmarks/first_hour.py has all of it). Of the config only the
number of steps and their size are others.
"""

import dataclasses
import functools
import json
import shlex
import shutil

import huggingface_hub.constants
import jax
import numpy as np
import pytest

import neo_jax
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.cli import train
from neo_jax.config import preset
from neo_jax.model.declared import param_shapes
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import load_tokenizer

COMMANDS = """
prepare my.txt --tokenizer EleutherAI/gpt-neo-125M --held-out 0.03
train finetune-125m --data data --output runs/x
generate "The 7 is" --model runs/x
""".strip().splitlines()


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tokenizer_folders):
    """A cache of the hub's library with the model, as EleutherAI/gpt-neo-125M."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "models--EleutherAI--gpt-neo-125M"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    few = {"num_layers": 2, "vocab_size": 512, "eos_token_id": 0}
    config = dataclasses.replace(preset("gpt-neo-125m"), **few)
    shapes = param_shapes(Neo(config))
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    params = jax.tree.map(lambda leaf: 0.02 * draw(leaf.shape), shapes)
    tokenizer = load_tokenizer(tokenizer_folders["bytes"])
    folder = repository / "snapshots" / ("0" * 40)
    save_pretrained(folder, config, params, tokenizer=tokenizer)
    return root


@pytest.fixture
def here(tmp_path, monkeypatch, cache):
    """An empty folder with my.txt, in which the hub is the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    load = train.load_config

    def short(name):
        config = load(name)
        assert config.optimizer.warmup_steps <= config.steps // 2
        optimizer = dataclasses.replace(config.optimizer, warmup_steps=1)
        sizes = {"steps": 3, "batch_size": 2, "length": 64, "eval_every": 3}
        return dataclasses.replace(config, **sizes, optimizer=optimizer)

    monkeypatch.setattr(train, "load_config", short)
    lines = [
        f"The {i} is one more than the {i - 1}, and one less than the {i + 1}." for i in range(700)
    ]
    (tmp_path / "my.txt").write_text("\n".join(lines))
    return tmp_path


def test_the_commands_word_for_word(here, run):
    prepared, trained, generated = map(shlex.split, COMMANDS)
    status, out, err = run(*prepared)
    assert status == 0, err
    assert "passages" in err
    assert "held_out" in out
    status, out, err = run(*trained)
    assert status == 0, err
    assert "step 3: held-out loss" in err
    assert "warmup" not in err
    assert out == "runs/x/model\n"
    status, out, err = run(*generated, "--max-new-tokens", "4")
    assert status == 0, err
    assert out.startswith("The 7 is")
    assert err == "model: runs/x/model\n"
    weights, first = (
        neo_jax.load(name).params["h_0"]["attn"]["q_proj"]["kernel"]
        for name in ("runs/x", "EleutherAI/gpt-neo-125M")
    )
    assert float(abs(weights - first).max()) > 0


def test_a_run_that_has_not_ended_says_how_to_use_it(here, fail, run):
    (here / "runs" / "x" / "checkpoints").mkdir(parents=True)
    message = fail("generate", "Hello", "--model", "runs/x")
    assert message == (
        "runs/x holds no config.json; of a run that has not ended, neo-jax convert runs/x NEW "
        "makes a model."
    )


@pytest.mark.parametrize("name", ["gpt-neo-125m", "bundled", "bundled/tokenizer.model"])
def test_tokenizers_are_named_as_models_are(here, cache, succeed, name, tokenizer_folders):
    published = cache / "models--EleutherAI--gpt-neo-125m"
    if not published.exists():  # as the hub has it in small letters too
        published.symlink_to(cache / "models--EleutherAI--gpt-neo-125M")
    if name.endswith(".model"):
        shutil.copytree(tokenizer_folders["pieces"], here / "bundled")
    fields = json.loads(succeed("prepare", "my.txt", "--tokenizer", name, "--json"))
    sizes = {"gpt-neo-125m": 320, "bundled": 4096, "bundled/tokenizer.model": 320}
    assert fields["vocab_size"] == sizes[name]
    assert (here / "data" / "dataset.json").is_file()


def test_a_tokenizer_that_is_not_there_is_a_line(here, fail):
    message = fail("prepare", "my.txt", "--tokenizer", "gpt-neo-125")
    assert "no published model 'gpt-neo-125'" in message
    assert "Did you mean 'gpt-neo-125m'?" in message
    assert not (here / "data").exists()


def test_a_model_without_a_tokenizer_takes_that_of_another(here, succeed, fail, checkpoints):
    (here / "in.txt").write_text("Call me Ishmael")
    score = ["score", "--input", "in.txt", "--model"]
    named = succeed(*score, checkpoints["bare"], "--tokenizer", checkpoints["bytes"])
    assert named == succeed(*score, checkpoints["bytes"])
    message = fail(*score, checkpoints["bare"], "--tokenizer", "bundled")
    assert message == (
        "the tokenizer has 4096 tokens and the model 327; name the one that the model was trained "
        "with."
    )
