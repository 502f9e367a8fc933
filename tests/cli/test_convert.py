"""neo-jax convert: JSON configs of EleutherAI/gpt-neo."""

import json

import pytest

from neo_jax.cli.train import load_config
from neo_jax.config import ModelConfig
from neo_jax.sharding.rules import make_sharding

THEIRS = {
    "n_layer": 6, "n_embd": 96, "n_head": 4, "n_vocab": 50304, "n_ctx": 512,
    "lr": 3e-4, "lr_decay": "linear", "warmup_steps": 70, "opt_name": "adam",
    "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-7, "weight_decay": 0.2, "gradient_clipping": 0.5,
    "train_batch_size": 64, "train_steps": 900, "tokens_per_mb_per_replica": 1024,
    "precision": "bfloat16", "recompute_grad": True, "scale_by_depth": True, "scale_by_in": False,
    "embed_dropout": 0.1, "res_dropout": 0.1, "attn_dropout": 0,
    "attention_types": [[["global", "local"], 3]], "activation_function": "gelu",
    "local_attention_radius": 128, "mesh_shape": "x:8,y:2",
    "layout": "heads:y,batch:x,vocab:y,intermediate_expanded:y",
    "datasets": [["books", 25, "documents_random", 0.3], ["news", 25, "documents_random", 0.7]],
    "model_path": "gs://somewhere/else",
}  # fmt: skip


@pytest.fixture
def convert(run, tmp_path):
    """Converts a config with changes; returns what train reads, and the notes."""

    def call(**changes):
        fields = {key: value for key, value in (THEIRS | changes).items() if value is not None}
        (tmp_path / "theirs.json").write_text(json.dumps(fields))
        output = tmp_path / "ours.py"
        status, out, err = run("convert", tmp_path / "theirs.json", output)
        assert status == 0, err
        assert out == f"{output}\n"
        text = output.read_text()
        assert max(map(len, text.splitlines())) <= 100
        for note in err.splitlines():
            assert f"# {note[:60]}" in text
        return load_config(str(output)), err

    return call


def test_every_value_arrives(convert):
    config, notes = convert()
    assert config.model == ModelConfig(
        num_layers=6, embed_dim=96, num_heads=4, vocab_size=50304, max_length=512, window_size=128
    )
    adam = config.optimizer
    assert (adam.name, adam.learning_rate, adam.schedule) == ("adamw", 3e-4, "linear")
    assert (adam.warmup_steps, adam.final_fraction, adam.epsilon) == (70, 0.1, 1e-7)
    assert (adam.beta1, adam.beta2, adam.weight_decay, adam.clip_norm) == (0.8, 0.9, 0.2, 0.5)
    assert (config.steps, config.batch_size, config.dtype) == (900, 64, "bfloat16")
    assert (config.remat, config.dropout, config.z_loss) == ("full", 0.1, 1e-4)
    assert config.accumulation == 4  # 8 sequences a replica, two at a time
    assert (config.data, config.output) == ("data/books=0.3,data/news=0.7", "runs/theirs")
    assert config.mesh == "data=8,model=2"
    assert config.rules == "batch:data,heads:model,vocab:model,mlp:model"
    assert make_sharding(config.mesh, config.rules, devices=16)
    assert "model_path 'gs://somewhere/else' is left out" in notes
    assert "stitched and sampled is left out" in notes


def test_what_has_no_counterpart_is_named(convert):
    config, notes = convert(
        opt_name="adafactor", lr_decay=None, gradient_clipping=None, n_vocab=300, precision=None,
        layout="batch:all,memory_length:all", mesh_shape="all:4", datasets=["one"],
        tokens_per_mb_per_replica=None, attn_dropout=0.2, embed_dropout=0, lr_decay_end=400,
        scale_by_depth=False, attention_types=[[["global", "none"], 2], [["local"], 2]],
    )  # fmt: skip
    assert (config.optimizer.name, config.optimizer.schedule) == ("adafactor", "constant")
    assert (config.optimizer.clip_norm, config.dtype, config.accumulation) == (0, "float32", 1)
    assert (config.mesh, config.rules, config.data) == ("data=4", "batch:data", "data/one")
    assert config.model.eos_token_id == -1
    for words in (
        "layout memory_length:all", "attn_dropout 0.2", "embed_dropout 0", "lr_decay_end 400",
        "scale_by_depth is off", "ANOTHER MODEL", "epsilon is left out",
    ):  # fmt: skip
        assert words in notes, words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 6}, "unknown key 'n_layers'. Did you mean 'n_layer'?"),
        ({"rotary_emb": True}, "'rotary_emb' is not of GPT-Neo and has no counterpart; remove it"),
        ({"lr": None}, "key 'lr' is missing; is the file whole?"),
        ({"activation_fn": "swish"}, "activation 'swish' has no counterpart; choose gelu or relu"),
        ({"attention_types": [3]}, "attention_types are [3], not units and how often they repeat"),
    ],
)
def test_configs_that_cannot_be_converted(fail, tmp_path, changes, message):
    fields = {key: value for key, value in (THEIRS | changes).items() if value is not None}
    (tmp_path / "theirs.json").write_text(json.dumps(fields))
    assert message in fail("convert", tmp_path / "theirs.json", tmp_path / "ours.py")
    assert not (tmp_path / "ours.py").exists()


def test_what_is_asked_must_be_files(fail, tmp_path):
    assert "a .json config and the .py file" in fail("convert", "a.txt", "b.py", status=2)
    assert "cannot read" in fail("convert", tmp_path / "nowhere.json", tmp_path / "b.py")
