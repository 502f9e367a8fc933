"""neo-jax info, and checkpoints that are not as they should be, by any verb that loads one."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import neo_jax
from neo_jax.checkpoints.open_model import read_config
from neo_jax.cli import main
from neo_jax.config import PRESETS, preset
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.devices.memory import tree_bytes
from neo_jax.model.declared import param_shapes
from neo_jax.model.transformer import Neo


def test_a_folder(succeed, checkpoints):
    for args in ([checkpoints["bytes"]], ["--model", checkpoints["bytes"]]):
        fields = json.loads(succeed("info", *args, "--json"))
        assert fields["model"] == str(checkpoints["bytes"])
        assert (fields["num_layers"], fields["embed_dim"], fields["vocab_size"]) == (2, 32, 327)
        weights = load_file(checkpoints["bytes"] / "model.safetensors")
        assert fields["parameters"] == sum(array.size for array in weights.values())
        assert fields["dtype"] == "float32"
        assert fields["tokenizer"] == "BytePairTokenizer, 320 tokens"
        assert (fields["global_layers"], fields["local_layers"]) == (1, 1)
        # A key and a value of 32 numbers, and a position, for each token in each layer that keeps
        # it; of int8 a scale for each of two heads too. A local layer has 8 slots, 16 to spare.
        for dtype, slot in (("float32", 260), ("bfloat16", 132), ("int8", 84)):
            assert fields[f"cache_bytes_per_token_{dtype}"] == 2 * slot
            assert fields[f"cache_bytes_per_token_{dtype}_beyond_window"] == slot
            assert fields[f"cache_bytes_{dtype}"] == slot * (64 + 24)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bytes_of_the_cache_are_those_of_the_arrays(succeed, checkpoints, dtype):
    fields = json.loads(succeed("info", checkpoints["bytes"], "--json"))
    model = Neo(read_config(checkpoints["bytes"]), cache_dtype=jnp.dtype(dtype))
    rows = jax.ShapeDtypeStruct((3,), jnp.int32)
    state = jax.eval_shape(
        functools.partial(engine.prefill, model, 64),
        param_shapes(model),
        jax.ShapeDtypeStruct((3, 16), jnp.int32),
        rows,
        rows,
        make_settings(SamplingOptions(), [0, 0, 0]),
    )
    assert 3 * fields[f"cache_bytes_{dtype}"] == tree_bytes(state.cache, tiled=False)


def test_a_table_for_people(succeed, checkpoints):
    rows = dict(line.split("  ", 1) for line in succeed("info", checkpoints["bare"]).splitlines())
    rows = {name.strip(): value.strip() for name, value in rows.items()}
    assert rows["attention types"] == "global, local"
    assert rows["tokenizer"] == "none"
    # 37,792 parameters, and rows of 32 up to a vocabulary of 384; 88 slots of a key, a value of 32
    # numbers, and their position
    assert rows["weight bytes float32"] == "158.46 kB"
    assert rows["weight bytes bfloat16"] == "79.23 kB"
    assert rows["cache bytes float32"] == "22.88 kB"
    assert rows["parameters"] == f"{327 * 32 + 64 * 32 + 2 * 12_608 + 64:,}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_bytes_of_the_weights_are_those_of_the_arrays(succeed, checkpoints, dtype):
    fields = json.loads(succeed("info", checkpoints["bytes"], "--json"))
    options = {"quantize": "int8", "dtype": "bfloat16"} if dtype == "int8" else {"dtype": dtype}
    params = neo_jax.load(checkpoints["bytes"], **options).params
    assert fields[f"weight_bytes_{dtype}"] == tree_bytes(params, tiled=False)


def test_an_adapter_alone(succeed, fail, tmp_path):
    """As PEFT writes them; its model need not be here."""
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": "EleutherAI/gpt-neo-1.3B",
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["v_proj", "q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    tensors = {"a.lora_A.weight": np.ones((3, 32)), "a.lora_B.weight": np.ones((16, 3))}
    arrays = {name: array.astype(np.float32) for name, array in tensors.items()}
    save_file(arrays, tmp_path / "adapter_model.safetensors")
    assert json.loads(succeed("info", tmp_path, "--json")) == {
        "adapter": str(tmp_path),
        "base_model": "EleutherAI/gpt-neo-1.3B",
        "rank": 3,
        "alpha": 6,
        "targets": ["q_proj", "v_proj"],
        "parameters": 3 * 32 + 16 * 3,
        "dtype": "float32",
    }
    assert "targets     q_proj, v_proj\n" in succeed("info", tmp_path)
    message = fail("info", tmp_path, "--mesh", "fsdp=8", status=2)
    assert "an adapter is laid out as its model is; name that: EleutherAI/gpt-neo-1.3B" in message
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors: No such file" in fail("info", tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset(succeed, name):
    fields = json.loads(succeed("info", name, "--json"))
    assert fields["model"] == name
    assert fields["parameters"] == preset(name).num_params
    assert fields["family"] == ("gpt2" if "gpt2" in name else "gpt_neo")
    assert fields["attention_types"] == ["global", "local"][: 1 if "gpt2" in name else 2]


def test_where_it_would_lie_on_devices_that_are_not_here(succeed):
    args = ("info", "gpt-neo-2.7b", "--mesh", "data=2,fsdp=8,model=4")
    fields = json.loads(succeed(*args, "--json"))["sharding"]
    assert fields["mesh"] == {"data": 2, "fsdp": 8, "model": 4}
    assert fields["rules"]["vocab"] == ["model"]
    out = succeed(*args)
    assert "rules  batch:data+fsdp, embed:fsdp, heads:model, mlp:model, vocab:model" in out
    assert "h_*/mlp/c_fc/kernel       32 x mlp 10240/model x embed 2560/fsdp" in out
    assert " embed │ 0 32  │ 1 33  │ 2 34  │ 3 35  │" in out


def test_where_it_would_lie_on_the_devices_that_are_here(succeed, fail, checkpoints):
    fields = json.loads(succeed("info", checkpoints["bytes"], "--rules", "fsdp", "--json"))
    assert fields["sharding"]["mesh"] == {"fsdp": 8}
    fields = json.loads(succeed("info", "--mesh", "data=2,fsdp=-1", "--json"))
    assert fields["sharding"]["mesh"] == {"data": 2, "fsdp": 4}
    assert "axis 'heads' of size 12 does not divide over 8 devices of model" in fail(
        "info", "gpt-neo-125m", "--rules", "tensor"
    )


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    arrays = load_file(path)
    edit(arrays)
    save_file(arrays, path)


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "truncated": (cut, "model.safetensors is damaged or cut short"),
    "corrupt": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"not a checkpoint at all"),
        "model.safetensors is damaged or cut short",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no model.safetensors",
    ),
    "a tensor is missing": (
        lambda folder: edit_weights(folder, lambda a: a.pop("transformer.h.1.mlp.c_fc.weight")),
        "lacks 1 of 30 tensors, the first transformer.h.1.mlp.c_fc.weight",
    ),
    "a wrong shape": (
        lambda folder: edit_weights(
            folder, lambda a: a.update({"transformer.wpe.weight": np.ones((63, 32), np.float32)})
        ),
        "transformer.wpe.weight is [63, 32], but config.json asks for [64, 32]",
    ),
    "a tensor too many": (
        lambda folder: edit_weights(folder, lambda a: a.update({"x": np.ones(3, np.float32)})),
        "holds 1 tensors that a model of this config.json has not",
    ),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "holds no config.json; name the folder of a checkpoint",
    ),
    "half a config": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "gpt_'),
        "config.json is not valid JSON",
    ),
    "another family": (
        lambda folder: edit_config(folder, model_type="gptj"),
        "model_type is 'gptj'; this loads 'gpt_neo' and 'gpt2' checkpoints",
    ),
    "an unknown field": (
        lambda folder: edit_config(folder, hidden_sise=33),
        "unknown field 'hidden_sise'. Did you mean 'hidden_size'?",
    ),
    "a field that contradicts": (
        lambda folder: edit_config(folder, num_heads=5),
        "num_heads 5",
    ),
    "half a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
        "tokenizer.json is not valid JSON",
    ),
}


@pytest.mark.filterwarnings("default")
def test_a_field_that_is_not_followed_is_a_line_on_stderr(checkpoints, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["bytes"], folder)
    edit_config(folder, rotary=True)
    assert main(["info", str(folder)]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"neo-jax: {folder / 'config.json'}: not followed: 'rotary', no field")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint(fail, checkpoints, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["bytes"], folder)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    text = fail("generate", "hi", "--model", folder)
    assert message in text
    assert str(folder) in text


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no config", "half a tokenizer"])
def test_info_of_a_damaged_checkpoint(fail, checkpoints, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["bytes"], folder)
    spoil, message = DAMAGES[damage]
    spoil(folder)
    assert message in fail("info", folder)


@pytest.mark.parametrize("verb", ["generate", "info", "score"])
def test_a_model_that_is_not_there(fail, tmp_path, verb):
    lines = tmp_path / "in.txt"
    lines.write_text("hi\n")
    args = {"generate": ["hi"], "info": [], "score": ["--input", lines]}[verb]
    assert "no folder and no published model 'gpt-neo-1.4b'" in fail(
        verb, *args, "--model", "gpt-neo-1.4b"
    )
    assert "Did you mean 'gpt-neo-1.3b'?" in fail(verb, *args, "--model", "gpt-neo-1.4b")
    assert "is a file; name the folder that holds it" in fail(verb, *args, "--model", lines)
    folder = tmp_path / "empty"
    folder.mkdir()
    assert "holds no config.json" in fail(verb, *args, "--model", folder)
    assert "is a folder" in fail(verb, *args, "--model", folder, "--revision", "main")
