"""transforms/quantize.py: models of int8 weights, on one device and on meshes."""

import json
import lzma
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import neo_jax
from neo_jax.checkpoints.open_model import read_config
from neo_jax.checkpoints.save import save_int8, save_pretrained
from neo_jax.cli import main
from neo_jax.decode.options import SamplingOptions
from neo_jax.model.tensor_table import tensors
from neo_jax.ops.int8 import Int8
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.config import TrainConfig
from neo_jax.training.initial_state import find_pretrained
from neo_jax.training.step import state_of
from neo_jax.transforms.quantize import is_rounded, quantize

KILLED = """
import os, signal, sys
from neo_jax.checkpoints import save
from neo_jax.cli import main

save._write_weights = lambda path, rows: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
HELD_OUT = Path(__file__).parents[1] / "corpora" / "held_out.jsonl.xz"
GREEDY = SamplingOptions(temperature=0)
PROMPTS = [[5, 6, 7], list(range(20, 50)), [9] * 4]


def dequantized(params):
    """Parameters with a float32 array in the place of each `Int8`."""
    return jax.tree.map(
        lambda leaf: leaf.dequantized() if isinstance(leaf, Int8) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Int8),
    )


@pytest.fixture(scope="module")
def float32(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


@pytest.fixture(scope="module")
def int8(checkpoints):
    return neo_jax.load(checkpoints["bytes"], quantize="int8")


def test_kernels_and_tokens_are_rounded_and_nothing_else(float32, int8):
    kinds = {}
    for path, leaf in flatten_dict(int8.params).items():
        kinds.setdefault(type(leaf).__name__, set()).add(path[-2:])
    assert kinds["Int8"] == {
        ("wte", "embedding"), ("q_proj", "kernel"), ("k_proj", "kernel"), ("v_proj", "kernel"),
        ("out_proj", "kernel"), ("c_fc", "kernel"), ("c_proj", "kernel"),
    }  # fmt: skip
    assert not any(path[-1] == "kernel" for path in kinds["ArrayImpl"])
    floats, back = flatten_dict(float32.params), flatten_dict(dequantized(int8.params))
    for tensor in tensors(int8.config):
        old, new = np.asarray(floats[tensor.path]), np.asarray(back[tensor.path])
        assert old.shape == new.shape
        if not is_rounded(tensor):
            np.testing.assert_array_equal(new, old)
            continue
        inputs = tuple(range(old.ndim))[-(tensor.num_inputs or 1) :]
        step = np.abs(old).max(axis=inputs, keepdims=True) / 127
        assert (np.abs(new - old) <= 0.5001 * step).all()
        assert np.abs(new - old).max() > 0


def test_loading_is_rounding_what_was_loaded(float32, int8):
    whole = quantize(float32.config, float32.params, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, whole, int8.params)


@pytest.fixture(scope="module")
def texts(int8):
    return int8.sample(PROMPTS, 12, sampling=GREEDY)


def test_it_is_the_model_of_the_rounded_weights(int8, texts):
    twin = neo_jax.LanguageModel(int8.model, dequantized(int8.params), int8.tokenizer, int8.folder)
    # Few rows of activations are rounded to 1 / 64516 of the largest; attention is sharp here.
    for ours, theirs in zip(texts, twin.sample(PROMPTS, 12, sampling=GREEDY), strict=True):
        assert ours.ids == theirs.ids
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("model=2", "tensor"),
        ("fsdp=8", "fsdp"),
        ("data=2,fsdp=2,model=2", "decode"),
        ("model=2,context=2", "head_dim:model,kv_length:context"),
    ],
)
def test_a_strategy_changes_no_number(checkpoints, int8, texts, mesh, rules):
    devices = jax.devices()[: math.prod(int(size[-1]) for size in mesh.split(","))]
    sharding = make_sharding(mesh, rules, devices)
    lm = neo_jax.load(checkpoints["bytes"], quantize="int8", sharding=sharding)
    for tensor in tensors(lm.config):
        leaf = flatten_dict(lm.params)[tensor.path]
        place = sharding.named(tensor.axes, tensor.shape)
        if isinstance(leaf, Int8):
            assert leaf.values.sharding.is_equivalent_to(place, leaf.values.ndim)
            leaf = leaf.scale
            place = sharding.named(tensor.axes[: leaf.ndim], tensor.shape[: leaf.ndim])
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, lm.params, int8.params)
    for ours, theirs in zip(lm.sample(PROMPTS, 12, sampling=GREEDY), texts, strict=True):
        assert ours.ids == theirs.ids
        # Another order of sums may turn the last digit of an activation that is rounded.
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=5e-4)


def test_what_stays_has_the_dtype_of_products(checkpoints):
    lm = neo_jax.load(checkpoints["bytes"], quantize="int8", dtype="bfloat16")
    dtypes = {}
    for path, leaf in flatten_dict(lm.params).items():
        dtypes.setdefault(path[-1], set()).update(a.dtype.name for a in jax.tree.leaves(leaf))
    assert dtypes == {
        "embedding": {"int8", "float32", "bfloat16"},  # of tokens, and of positions
        "kernel": {"int8", "float32"},
        "scale": {"bfloat16"},
        "bias": {"bfloat16"},
    }
    assert lm.generate(["The quick"], 5)


def test_bits_a_byte_of_the_bundled_model():
    """On documents that training never saw, 6000 characters each."""
    with lzma.open(HELD_OUT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:6000] for line in file][:2]
    bits = []
    for kind in ("none", "int8"):
        scores = neo_jax.load(quantize=kind).score(texts)
        nats = -sum(float(score.logprobs.sum(dtype="float64")) for score in scores)
        bits.append(nats / math.log(2) / sum(score.num_bytes for score in scores))
    assert abs(bits[1] / bits[0] - 1) < 0.005
    assert bits[0] != bits[1]


def test_an_unknown_kind_is_refused(checkpoints):
    with pytest.raises(neo_jax.NeoError, match="quantize must be 'none' or 'int8', not 'int9'"):
        neo_jax.load(checkpoints["bytes"], quantize="int9")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_stored_is_what_is_loaded(checkpoints, stored, dtype):
    folder, _ = stored
    ours = neo_jax.load(folder, dtype=dtype)
    rounded = neo_jax.load(checkpoints["bytes"], quantize="int8", dtype=dtype)
    assert ours.config == rounded.config
    jax.tree.map(np.testing.assert_array_equal, ours.params, rounded.params)
    assert ours.encode("The quick") == rounded.encode("The quick")


def test_a_stored_model_is_split_as_it_is_read(stored, int8):
    sharding = make_sharding("fsdp=4,model=2", "decode")
    lm = neo_jax.load(stored[0], sharding=sharding)
    rounded = quantize(int8.config, dequantized(lm.params), jnp.float32, sharding)
    for ours, theirs in zip(jax.tree.leaves(lm.params), jax.tree.leaves(rounded), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    jax.tree.map(np.testing.assert_array_equal, lm.params, int8.params)


def test_the_command_and_its_several_files(stored, tmp_path, capsys, checkpoints):
    folder, lm = stored
    save_int8(tmp_path / "several", lm.config, lm.params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 2
    jax.tree.map(
        np.testing.assert_array_equal, neo_jax.load(tmp_path / "several").params, lm.params
    )
    assert main(["quantize", str(checkpoints["bytes"]), str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "small")
    weights = [path / "model.safetensors" for path in (folder, tmp_path / "small")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert weights[0].stat().st_size < 0.45 * (
        (checkpoints["bytes"] / "model.safetensors").stat().st_size
    )
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "int8"


@pytest.mark.parametrize("mesh", ["", "fsdp=8"])
@pytest.mark.parametrize("name", ["h_1.mlp.c_fc.kernel_scale", "ln_f.bias"])
def test_floats_of_it_that_are_not_finite(stored, tmp_path, name, mesh):
    shutil.copytree(stored[0], tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    arrays = load_file(file)
    arrays[name].flat[-1] = np.nan
    save_file(arrays, file)
    with pytest.raises(neo_jax.NeoError, match=f"{name} holds NaN or infinite numbers"):
        neo_jax.load(tmp_path / "damaged", mesh=mesh)


def test_what_wants_floats_refuses_it(stored, tmp_path):
    folder, lm = stored
    for refused in (
        lambda: read_config(folder),
        lambda: find_pretrained(TrainConfig("", "", 1, 8, pretrained=str(folder))),
    ):
        with pytest.raises(neo_jax.NeoError, match="name the checkpoint of floats"):
            refused()
    with pytest.raises(neo_jax.NeoError, match="int8 weights cannot be trained"):
        state_of(lm.params, optax.sgd(1.0))
    with pytest.raises(neo_jax.NeoError, match="is no int8 weight"):
        save_int8(tmp_path, lm.config, dequantized(lm.params))
    with pytest.raises(neo_jax.NeoError, match="is a Int8"):
        save_pretrained(tmp_path, lm.config, lm.params)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    fields = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(fields | {"vocab_size": 1000}))
    with pytest.raises(neo_jax.NeoError, match=r"wte.embedding, int8 \[1024, 32\]"):
        neo_jax.load(damaged)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, int8):
    folder = tmp_path_factory.mktemp("int8")
    save_int8(folder, int8.config, int8.params, tokenizer=int8.tokenizer)
    return folder, int8


def test_killed_and_done_again_and_nothing_replaced(checkpoints, tmp_path, capsys):
    """What a kill leaves goes, and what is whole stays; `convert` writes by the same functions."""
    args = ["quantize", str(checkpoints["bare"]), str(tmp_path / "out")]
    root = str(Path(neo_jax.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *args],
        env=os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name[:8] for path in sorted((tmp_path / "out").iterdir())] == [".lock", ".saving-"]
    assert main(args) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors"}
    capsys.readouterr()
    assert main(args) == 1
    assert capsys.readouterr().err == (
        f"neo-jax: {tmp_path}/out is there already; choose a new folder, or remove that one.\n"
    )
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
