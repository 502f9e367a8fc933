import dataclasses
import json

import pytest

from neo_jax.config import ModelConfig
from neo_jax.data.prepare import prepare
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.training import snapshot
from neo_jax.training.config import OptimizerConfig, TrainConfig


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    """What cannot be read is read again at once."""
    monkeypatch.setattr(snapshot, "_PAUSES", (0.0,))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, tokenizer_folders, text):
    """A data set of a text that repeats, a part of it held out."""
    root = tmp_path_factory.mktemp("dataset")
    lines = [{"text": f"{i}. {line}"} for i in range(40) for line in text.splitlines()]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare([root / "text.jsonl"], root / "data", tokenizer_folders["pieces"], held_out=0.1)
    return root / "data"


@pytest.fixture(scope="session")
def six_steps(dataset):
    """A run of six steps in float32 that logs each of them; it names no output yet."""
    return TrainConfig(
        data=str(dataset),
        output="",
        steps=6,
        batch_size=8,
        model=ModelConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=2,
            vocab_size=320,
            max_length=32,
            window_size=8,
            eos_token_id=1,
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.1),
        dtype="float32",
        log_every=1,
        eval_every=0,
        save_every=3,
    )


@pytest.fixture
def six_epochs(checkpoints, tmp_path):
    """Of a folder of examples with labels, and a length: a run that learns from them."""
    enable_compilation_cache()

    def make(data, length):
        return TrainConfig(
            data=str(data), output=str(tmp_path / "run"), steps=0, epochs=6, batch_size=8,
            pretrained=str(checkpoints["bytes"]), length=length, dtype="float32",
            optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4, beta2=0.999),
            log_every=4, save_every=1000, keep=1,
        )  # fmt: skip

    return make


@pytest.fixture
def config(six_steps, tmp_path):
    """`six_steps` into a folder of its own; runs of one program compile it once."""
    enable_compilation_cache()
    return dataclasses.replace(six_steps, output=str(tmp_path / "run"))
