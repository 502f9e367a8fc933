"""checkpoints/peft.py: what we write PEFT reads, what PEFT writes we read."""

import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax.checkpoints.adapter_files import CONFIG, WEIGHTS
from neo_jax.checkpoints.peft import load_adapter, save_adapter
from neo_jax.errors import NeoError
from neo_jax.model.scan import stack, unstack
from neo_jax.transforms.lora import LoraConfig, add_adapters, init_adapters, merge

pytestmark = pytest.mark.optimized

LORA = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "out_proj", "c_fc", "c_proj"))
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 24))


@pytest.fixture(scope="module")
def base(checkpoints):
    return checkpoints["pieces"]


@pytest.fixture(scope="module")
def ours(base, tmp_path_factory):
    """A folder of adapters that we wrote, with the logits of the model that has them unmerged."""
    lm = neo_jax.load(base)
    adapters = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 8,
        init_adapters(lm.config, LORA, jax.random.key(0)),
    )
    stacked = add_adapters(stack(lm.params, lm.config), adapters, LORA.scale)
    params = unstack(stacked, lm.config)
    folder = tmp_path_factory.mktemp("ours") / "adapter"
    save_adapter(folder, lm.config, LORA, params, base=str(base))
    return folder, logits(lm, params), params


@pytest.fixture(scope="module")
def theirs(base, tmp_path_factory):
    """A folder of adapters that PEFT wrote, with its model's logits in float32 and in float64."""
    torch.manual_seed(0)
    model = GPTNeoForCausalLM.from_pretrained(base, attn_implementation="eager")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["k_proj", "out_proj", "c_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    folder = tmp_path_factory.mktemp("theirs")
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(folder)
    return folder, torch_logits(model), torch_logits(model.double())


def logits(lm, params):
    return np.asarray(lm.model.apply({"params": params}, jnp.asarray(TOKENS)).logits)


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def noise(found, exact):
    """The root of the mean square: the largest error alone is a matter of the CPU's kernels."""
    return np.sqrt(np.mean((found - exact) ** 2))


def test_peft_reads_ours(base, ours):
    folder, expected, _ = ours
    model = GPTNeoForCausalLM.from_pretrained(base, attn_implementation="eager")
    before = torch_logits(model)
    with warnings.catch_warnings(action="error", category=UserWarning):  # of missing keys
        model = peft.PeftModel.from_pretrained(model, folder)
    theirs, exact = torch_logits(model), torch_logits(model.double())
    assert noise(expected, exact) <= 2 * noise(theirs, exact)
    assert np.abs(expected - exact).max() <= 2.5 * np.abs(theirs - exact).max()
    assert np.abs(before - expected).max() > 0.1 * np.abs(expected).max()
    assert model.peft_config["default"].target_modules == set(LORA.targets)


def test_we_read_ours(ours):
    folder, expected, params = ours
    lm = neo_jax.load(folder)
    assert lm.folder == folder
    assert lm.tokenizer  # of the base
    assert_close(logits(lm, lm.params), expected)
    for mine, other in zip(*map(jax.tree.leaves, (lm.params, merge(params))), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mesh", ["", "fsdp=4,model=2"])
def test_we_read_what_peft_wrote(theirs, mesh):
    folder, single, double = theirs
    lm = neo_jax.load(folder, mesh=mesh)
    found = logits(lm, lm.params)
    assert noise(found, double) <= 2 * noise(single, double)
    assert np.abs(found - double).max() <= 2 * np.abs(single - double).max()
    if mesh:
        kernel = lm.params["h_0"]["mlp"]["c_proj"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (8, 64)


def test_the_model_keeps_its_dtype(ours):
    lm = neo_jax.load(ours[0], dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"bfloat16"}


def test_adapters_in_the_cloud(ours, bucket):
    folder, _, params = ours
    lm = neo_jax.load(folder)
    there = f"gs://{bucket}/adapter"
    save_adapter(there, lm.config, LORA, params, base=str(folder), tokenizer=lm.tokenizer)
    here, back = load_adapter(folder, lm.config), load_adapter(there, lm.config)
    assert {change.scale for x in (here, back) for change in x.changes.values()} == {2}
    for mine, other in zip(*map(jax.tree.leaves, (here[1:], back[1:])), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_short_names_are_written_in_full(ours, tmp_path):
    lm = neo_jax.load(ours[0])
    save_adapter(tmp_path, lm.config, LORA, ours[2], base="gpt-neo-1.3b")
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["base_model_name_or_path"] == "EleutherAI/gpt-neo-1.3B"


@pytest.fixture
def copy(theirs, tmp_path):
    """A copy of what PEFT wrote, to be changed: by fields, or by tensors."""

    def change(fields=None, tensors=None):
        config = json.loads((theirs[0] / CONFIG).read_text())
        (tmp_path / CONFIG).write_text(json.dumps(config | (fields or {})))
        save_file((tensors or dict)(load_file(theirs[0] / WEIGHTS)), tmp_path / WEIGHTS)
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow is 1"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; this loads 'LORA'"),
        ({"r": 0}, "r 0 must lie between 1 and 1,048,576"),
        ({"r": 10**12}, "r 1000000000000 must lie between 1"),
        ({"r": True}, "r must be a whole number, not True"),
        ({"r": None}, "r must be a whole number, not None"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan must be finite"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf must be finite"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number, not 1000"),
        ({"lora_alpha": True}, "lora_alpha must be a number, not True"),
        ({"target_modules": 5}, "target_modules are 5, not names of kernels"),
        ({"target_modules": [1, "a"]}, "target_modules are [1, 'a'], not names of kernels"),
        ({"revision": [1]}, "revision [1] is no name"),
        ({"r": 8}, "lora_A.weight is float32 [3, 32], not of floats [8, 32]; is the adapter for"),
        ({"base_model_name_or_path": None}, "names no model in base_model_name_or_path"),
        ({"base_model_name_or_path": "no/such/folder"}, "base_model_name_or_path in "),
    ],
)
def test_adapters_that_are_refused(copy, fields, message):
    assert message in refusal(copy(fields))


def refusal(folder):
    with pytest.raises(NeoError) as error:
        neo_jax.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_tensors_that_are_refused(copy):
    def rename(tensors):
        name = next(iter(tensors))
        return {**tensors, name.replace("transformer", "elsewhere"): tensors[name]}

    def halve(tensors):
        return {
            name: array for name, array in tensors.items() if "h.0.mlp.c_proj.lora_B" not in name
        }

    def spoil(tensors):
        return {**tensors, (name := next(iter(tensors))): np.full_like(tensors[name], np.inf)}

    assert "holds NaN or infinite numbers" in refusal(copy(tensors=spoil))
    assert "holds the tensor base_model.model.elsewhere.h.0." in refusal(copy(tensors=rename))
    assert "lacks base_model.model.transformer.h.0.mlp.c_proj.lora_B" in refusal(
        copy(tensors=halve)
    )
    assert "holds no adapters; this loads LoRA" in refusal(copy(tensors=lambda _: {}))
    folder = copy()
    (folder / WEIGHTS).unlink()
    assert "adapter_model.safetensors: No such file" in refusal(folder)
