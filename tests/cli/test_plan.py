"""neo-jax plan, on CPU devices that are here and on TPUs that are not."""

import dataclasses
import json

import jax
import pytest

import neo_jax
from neo_jax.cli import main
from neo_jax.cli.plan import ConfigOptions, PlanOptions, _with_model
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.training.config import TrainConfig

pytestmark = pytest.mark.tpu_compiler

CONFIG = """
from neo_jax.config import ModelConfig
from neo_jax.training.config import TrainConfig

config = TrainConfig(
    data="",
    output="",
    steps=10,
    batch_size=16,
    model=ModelConfig(num_layers=2, embed_dim=64, num_heads=4, vocab_size=300, max_length=64),
)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return str(path)


def run(capsys, *args):
    status = main(["plan", *args])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def fail(capsys, *args):
    status = main(["plan", *args])
    err = capsys.readouterr().err
    assert status
    assert err.count("\n") == 1
    return err


@pytest.mark.core
def test_the_step_of_a_config(capsys, config):
    table = run(capsys, config, "--topology", "cpu:8", "--mesh", "fsdp=4,model=2")
    assert "cpu:8, 8 x cpu" in table
    assert "fsdp=4, model=2" in table
    assert "times along model" in table


def test_fields_are_options(capsys, config):
    small = json.loads(run(capsys, config, "--topology", "cpu:8", "--json"))
    assert small["mesh"] == {"fsdp": 8}
    assert small["tokens"] == 16 * 64
    assert small["memory"]["arguments"] == sum(small["memory"]["parts"].values())
    assert small["fits"] is True
    wide = json.loads(
        run(capsys, config, "--topology", "cpu:8", "--json", "--model.mlp-dim", "1024")
    )
    assert wide["parameters"] > small["parameters"]
    assert wide["flops"]["useful"] > small["flops"]["useful"]


@pytest.mark.parametrize("step", ["train", "prefill", "decode"])
def test_steps_of_a_model(capsys, step, checkpoints):
    fields = json.loads(
        run(
            capsys, "--model", str(checkpoints["bare"]), "--step", step, "--topology", "cpu:4",
            "--mesh", "data=2,model=2", "--batch", "4", "--length", "32", "--json",
        )
    )  # fmt: skip
    assert fields["tokens"] == (4 if step == "decode" else 4 * 32)
    assert ("cache" in fields["memory"]["parts"]) == (step != "train")
    assert fields["devices"] == 4


def test_a_search(capsys, config, tmp_path):
    picture = tmp_path / "ranking.png"
    args = (config, "--topology", "cpu:4", "--search", "--picture", str(picture))
    _, *table = run(capsys, *args).splitlines()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert ["compiled" in line for line in table[:4]] == [True] * 3 + [False]
    assert "ways considered" in table[-2]
    assert table[-1].startswith("--mesh ")


def test_arithmetic_alone(capsys, config):
    args = (config, "--topology", "v5e:2x2", "--arithmetic", "--json")
    fields = json.loads(run(capsys, *args))
    (row,) = fields["ranking"]
    assert row["estimate"]["fits"] is True
    assert row["plan"] is None
    ranked = json.loads(run(capsys, *args, "--search", "--memory", "0.000001"))
    assert ranked["considered"] > 10
    assert ranked["why"].startswith("Nothing fits")
    assert "--arithmetic is for" in fail(
        capsys, "--model", "gpt-neo-125m", "--step", "decode", "--arithmetic",
    )  # fmt: skip


@pytest.mark.core
def test_a_tpu(capsys, config, tmp_path):
    picture = tmp_path / "plan.png"
    args = (config, "--topology", "v5e:2x2", "--picture", str(picture), "--json")
    fields = json.loads(run(capsys, *args))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert fields["device_kind"] == "TPU v5 lite"
    assert fields["fits"] is True
    assert fields["mfu"] > 0


def test_published_checkpoints_are_known_without_the_hub():
    run = TrainConfig("", "", 1, 1, pretrained="EleutherAI/gpt-neo-1.3B", new_tokens=2)
    config = ConfigOptions(run, PlanOptions()).config
    assert _with_model(config).model.vocab_size == 50259
    assert _with_model(config).model.embed_dim == 2048
    assert _with_model(dataclasses.replace(config, pretrained="bundled")).model.embed_dim < 1000


def test_what_data_is_for_decides_what_is_trained(capsys, tmp_path, tokenizer_folders):
    """Examples with labels make a classifier, which has no logits of tokens."""
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "good\tyes\nbad\tno\n" * 4)
    data = tmp_path / "data"
    prepare_labelled([tmp_path / "a.tsv"], data, tokenizer_folders["bytes"])
    (tmp_path / "classes.py").write_text(
        CONFIG.replace("steps=10", "steps=0, epochs=2").replace('data=""', f"data={str(data)!r}")
    )
    args = str(tmp_path / "classes.py"), "--topology", "v5e:2x2", "--mesh", "fsdp=4", "--arithmetic"
    (classes,) = json.loads(run(capsys, *args, "--json"))["ranking"]
    (texts,) = json.loads(run(capsys, *args, "--json", "--data", "not-here"))["ranking"]
    assert classes["estimate"]["ms"] < texts["estimate"]["ms"]
    assert classes["estimate"]["memory"] < texts["estimate"]["memory"]
    table = run(capsys, *args[:1], "--topology", "cpu:2", "--mesh", "fsdp=2")
    assert "trains        a classifier of texts" in table


def test_errors_are_one_line(capsys, config, tmp_path):
    assert "is not a topology" in fail(capsys, config, "--topology", "v5e")
    assert "asks for 3 devices" in fail(capsys, config, "--topology", "cpu:4", "--mesh", "fsdp=3")
    assert "does not divide" in fail(capsys, config, "--topology", "cpu:8", "--batch-size", "3")
    assert "exceeds the model's context" in fail(
        capsys, "--model", "gpt-neo-125m", "--step", "decode", "--length", "5000",
        "--topology", "cpu:4",
    )  # fmt: skip
    assert "cannot write" in fail(
        capsys, config, "--topology", "cpu:4", "--picture", str(tmp_path / "no" / "a.png")
    )


def test_int8_weights_and_cache_of_decoding(capsys, checkpoints):
    """What the plan says is what the arrays take, and the compiler agrees."""
    args = ("--model", str(checkpoints["bytes"]), "--step", "decode", "--topology", "cpu:8")
    args += ("--mesh", "data=2,fsdp=2,model=2", "--rules", "decode", "--batch", "4")
    args += ("--dtype", "float32", "--quantize", "int8", "--cache-dtype", "int8")
    fields = json.loads(run(capsys, *args, "--json"))
    lm = neo_jax.load(
        checkpoints["bytes"],
        mesh="data=2,fsdp=2,model=2",
        rules="decode",
        quantize="int8",
        cache_dtype="int8",
    )
    prompts, new = [[1, 2, 3]] * 4, lm.config.max_length - 3
    state = engine.start(
        lm.model, lm.params, prompts, new, make_settings(SamplingOptions(), [0] * 4)
    )
    parts = fields["memory"]["parts"]
    assert parts["cache"] == on_a_device(state.cache)
    assert parts["parameters"] == on_a_device(lm.params)
    assert sum(parts.values()) == fields["memory"]["arguments"]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.cache))
    assert fields["cache"]["per_sequence"] * 4 == size
    assert fields["cache"]["dtype"] == "int8"
    assert "a token, int8" in run(capsys, *args)
    assert "are for --step prefill, decode and serve" in fail(
        capsys, "--topology", "cpu:8", "--quantize", "int8"
    )


def on_a_device(tree):
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def test_how_many_sequences_a_server_can_write(capsys, checkpoints):
    """As many as fit: one unit more does not, by the same arithmetic."""
    args = ("--model", str(checkpoints["bare"]), "--step", "serve", "--topology", "cpu:4")
    args += ("--mesh", "data=2,model=2", "--rules", "decode")
    fields = json.loads(run(capsys, *args, "--batch", "4", "--json"))
    (server,) = fields["servers"]
    assert fields["max_sequences"] == server["sequences"] == 4
    step = server["plan"]["memory"]
    assert step["arguments"] == sum(step["parts"].values())
    assert server["memory"] > step["total"]
    assert server["plan"]["cache"]["per_sequence"] > 0
    assert "--max-sequences 4, of up to 64 tokens" in run(capsys, *args, "--batch", "4")
