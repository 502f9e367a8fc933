"""neo-jax convert SRC DST: checkpoints, from every format and back."""

import json
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.cli.train import load_config
from neo_jax.config import ModelConfig
from neo_jax.model.scan import unstack
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.config import TrainConfig
from neo_jax.training.initial_state import first_state
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import abstract_state, init_state

pytestmark = pytest.mark.optimized

GPT_NEO = ModelConfig(
    num_layers=3, embed_dim=24, num_heads=3, vocab_size=97, max_length=48, window_size=8,
    attention_types=("global", "global", "local"), eos_token_id=-1,
)  # fmt: skip
GPT2 = ModelConfig(
    num_layers=2, embed_dim=24, num_heads=3, mlp_dim=40, vocab_size=97, max_length=32,
    attention_types=("global",), eos_token_id=-1, qkv_bias=True, scale_attention=True,
    tied_head=False,
)  # fmt: skip


def random_params(config, dtype=np.float32):
    rng = np.random.default_rng(0)
    leaves = {}
    for row in tensors(config):
        leaf = np.zeros(row.shape, dtype)
        leaf[: row.stored_shape[0]] = 0.3 * rng.normal(size=row.stored_shape)
        leaves[row.path] = leaf
    return unflatten_dict(leaves)


def stored(config, params, form):
    """The tensors of a format by their names."""
    leaves, parts = flatten_dict(params), {}
    for row in tensors(config):
        place = row.places[form]
        array = np.ascontiguousarray(row.to(form, leaves[row.path]))
        parts.setdefault(place.name, (place.axis, []))[1].append(array)
    return {name: np.concatenate(arrays, axis) for name, (axis, arrays) in parts.items()}


def write(folder, config, params, kind):
    """Writes what other programs would write; "-sharded" in two files and an index."""
    save_pretrained(folder, config, params)
    if kind == "safetensors":
        return folder
    (folder / "model.safetensors").unlink()
    single = {"bin": "pytorch_model.bin", "msgpack": "flax_model.msgpack"}[kind.split("-")[0]]
    arrays = stored(config, params, "hf" if kind.startswith("bin") else "flax")
    if not kind.endswith("sharded"):
        groups = {single: arrays}
    else:
        names = list(arrays)
        groups = {
            f"part-{i}{Path(single).suffix}": {name: arrays[name] for name in names[i::2]}
            for i in range(2)
        }
        weight_map = {name: file for file, group in groups.items() for name in group}
        (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, group in groups.items():
        if kind.startswith("bin"):
            state = {name: to_torch(array) for name, array in group.items()}
            state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.bool)
            torch.save(state, folder / file)
        else:
            nested = unflatten_dict({tuple(name.split("/")): a for name, a in group.items()})
            (folder / file).write_bytes(flax.serialization.msgpack_serialize(nested))
    return folder


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


KINDS = ("safetensors", "bin", "bin-sharded", "msgpack", "msgpack-sharded")


@pytest.mark.parametrize("config", [GPT_NEO, GPT2], ids=["gpt_neo", "gpt2"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_format_loads_byte_for_byte(tmp_path, kind, dtype, config):
    params = random_params(config, dtype)
    folder = write(tmp_path / "theirs", config, params, kind)
    loaded = flatten_dict(load_params(folder, config))
    for path, leaf in flatten_dict(params).items():
        assert loaded[path].dtype == leaf.dtype
        assert np.asarray(loaded[path]).tobytes() == leaf.tobytes(), path


@pytest.mark.parametrize("config", [GPT_NEO, GPT2], ids=["gpt_neo", "gpt2"])
@pytest.mark.parametrize("kind", ["safetensors", "bin", "msgpack"])
def test_what_is_written_is_proved(run, tmp_path, kind, config):
    params = random_params(config)
    folder = write(tmp_path / "theirs", config, params, kind)
    status, out, err = run("convert", folder, tmp_path / "ours", "--json")
    assert (status, err) == (0, "")
    fields = json.loads(out)
    expected = stored(config, params, "hf")
    assert fields["tensors"] == len(expected)
    assert fields["parameters"] == config.num_params
    assert fields["num_bytes"] == 4 * config.num_params
    assert fields["largest_difference"] == 0
    assert "tokens: " in fields["logits"]
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes()


def test_another_dtype_in_several_files(succeed, tmp_path, tokenizer_folders):
    params = random_params(GPT2)
    folder = write(tmp_path / "theirs", GPT2, params, "bin")
    out = succeed(
        "convert", folder, tmp_path / "ours", "--dtype", "bfloat16", "--max-shard-gb", "2e-5",
        "--tokenizer", tokenizer_folders["bytes"],
    )  # fmt: skip
    rows = dict(map(str.strip, line.split("  ", 1)) for line in out.splitlines())
    assert 1e-4 < float(rows["largest difference"]) < 1e-2
    assert rows["tokenizer"] == "written"
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert (tmp_path / "ours" / "tokenizer.json").is_file()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16


def test_nothing_is_overwritten_and_nothing_unproved_is_silent(succeed, fail, tmp_path):
    folder = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "safetensors")
    out = succeed("convert", folder, tmp_path / "ours", "--no-verify")
    assert "no, as --no-verify asks" in out
    assert "is there already; choose a new folder" in fail("convert", folder, tmp_path / "ours")
    assert "name a checkpoint and the folder" in fail("convert", folder, status=2)


def test_damage_on_the_way_is_found(fail, tmp_path, monkeypatch):
    from neo_jax.checkpoints import save

    folder = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "safetensors")
    copy, count = save.copy, []

    def flip(view, dtype, shape):
        count.append(1)
        array = copy(view, dtype, shape)
        array.flat[0] += len(count) == 7
        return array

    monkeypatch.setattr(save, "copy", flip)
    text = fail("convert", folder, tmp_path / "ours")
    assert "is not what its source holds; do not use this folder" in text


class Harm:
    """What a pickle that runs code holds."""

    def __reduce__(self):
        return (Path.touch, (Path("harm"),))


def test_a_pickle_that_runs_code_is_refused(fail, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "bin")
    torch.save({"transformer.wte.weight": Harm()}, folder / "pytorch_model.bin")
    text = fail("convert", folder, tmp_path / "ours")
    assert "holds more than tensors, which could run code" in text
    assert not (tmp_path / "harm").exists()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "is damaged" in fail("info", folder)


def test_the_checkpoint_of_a_run(succeed, tmp_path):
    config = TrainConfig(data="none", output="", steps=1, batch_size=1, model=GPT_NEO)
    state = init_state(Neo(GPT_NEO), make_optimizer(config.optimizer, 1), 0)
    expected = jax.tree.map(np.asarray, unstack(state.params, GPT_NEO))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        checkpoints.save(state, config)
    for name in ("run", "run/checkpoints/0"):
        output = tmp_path / f"ours-{len(name)}"
        fields = json.loads(succeed("convert", tmp_path / name, output, "--json"))
        assert fields["parameters"] == GPT_NEO.num_params
        for path, leaf in flatten_dict(load_params(output, GPT_NEO)).items():
            np.testing.assert_array_equal(leaf, flatten_dict(expected)[path])
    fields = json.loads(succeed("info", tmp_path / "run", "--json"))
    assert fields["dtype"] == "float32"


CONFIG = """
from neo_jax.config import ModelConfig
from neo_jax.labels import HeadConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="nowhere", output="nowhere", steps=3, batch_size=2, model={model!r}, dtype="float32",
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
)
"""


def test_a_run_that_begins_with_these_weights(succeed, tmp_path):
    """Its state is that of `train --pretrained`, bit by bit; all else follows from the config."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float16), random_params(GPT2))
    theirs = write(tmp_path / "theirs", GPT2, params, "bin")
    file, run = tmp_path / "config.py", tmp_path / "run"
    file.write_text(CONFIG.format(model=GPT2))
    fields = json.loads(succeed("convert", theirs, run, "--train", file, "--json"))
    assert fields["tensors"] == len(stored(GPT2, params, "hf"))
    assert fields["parameters"] == GPT2.num_params
    assert (fields["num_bytes"], fields["largest_difference"]) == (4 * GPT2.num_params, 0)
    config, model = load_config(str(file)), Neo(GPT2)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(run / "checkpoints") as checkpoints:
        found = checkpoints.restore_latest(abstract_state(model, optimizer), config)
    expected = first_state(config, model, optimizer, theirs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert found.step == 0
    fields = json.loads(succeed("convert", run, tmp_path / "back", "--json"))
    assert (fields["parameters"], fields["largest_difference"]) == (GPT2.num_params, 0)


def test_runs_that_cannot_be_begun(fail, tmp_path):
    theirs = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "safetensors")
    file, run = tmp_path / "config.py", tmp_path / "run"
    file.write_text(CONFIG.format(model=GPT2))
    text = fail("convert", theirs, run, "--train", file)
    assert "num_layers 2, not 3;" in text
    assert "change its field model" in text
    assert "holds float32" in fail(
        "convert", theirs, run, "--train", file, "--dtype", "float16", status=2
    )
    assert not run.exists()
    file.write_text(CONFIG.format(model=GPT_NEO))
    run.mkdir()
    (run / "file").write_text("")
    assert "is there already" in fail("convert", theirs, run, "--train", file)


def test_damage_in_a_run_is_found(fail, tmp_path, monkeypatch):
    def save(self, state, config, save=Checkpoints.save):
        params = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].add(1), state.params)
        save(self, state._replace(params=params), config)

    theirs = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "safetensors")
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(model=GPT_NEO))
    monkeypatch.setattr(Checkpoints, "save", save)
    assert "is not what its source holds" in fail(
        "convert", theirs, tmp_path / "run", "--train", file
    )


def test_from_a_checkout_as_a_module(tmp_path):
    folder = write(tmp_path / "theirs", GPT_NEO, random_params(GPT_NEO), "safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "convert", folder, tmp_path / "ours", "--no-verify"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ours" / "model.safetensors").is_file()
