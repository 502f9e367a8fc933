"""checkpoints/peft.py: every kind of adapter gives the logits that PEFT has, or is refused."""

import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from small_families import FAMILIES, TOKENS, disturb, read_base, write_bases

import neo_jax
from neo_jax.checkpoints.adapter_files import CONFIG, WEIGHTS
from neo_jax.checkpoints.peft import describe_adapter
from neo_jax.errors import NeoError

pytestmark = pytest.mark.optimized


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options)


EQUAL = {
    "plain": lora(),
    "all linear maps": lora(target_modules="all-linear"),
    "target_modules as a pattern": lora(target_modules=r".*\.mlp\.c_(fc|proj)"),
    "exclude_modules, layers_to_transform": lora(
        target_modules=["c_fc", "c_proj"], exclude_modules=r".*\.h\.0\..*",
        layers_to_transform=[0, 1]),
    "gaussian": lora(init_lora_weights="gaussian"),
    "rslora": lora(use_rslora=True),
    "rank_pattern, alpha_pattern": lora(
        target_modules=["c_fc", "c_proj"], rank_pattern={"c_fc": 2, r"h\.1\.mlp\.c_proj": 7},
        alpha_pattern={r"^transformer\.h\.0\.mlp\.c_fc": 3, "c_proj": 9}),
    "rslora with patterns": lora(
        target_modules="all-linear", use_rslora=True, rank_pattern={"c_proj": 2},
        alpha_pattern={"c_fc": 3}),
    "dora": lora(target_modules="all-linear", use_dora=True),
    "dora, rslora with patterns": lora(
        target_modules=["c_fc", "c_proj"], use_dora=True, use_rslora=True,
        rank_pattern={"c_proj": 2}),
    "bias of adapted maps": lora(target_modules="all-linear", bias="lora_only"),
    "all biases": lora(bias="all"),
    "head saved": lora(modules_to_save=["lm_head"]),
    "embeddings saved": lora(modules_to_save=["wte", "wpe"]),
    "head and embeddings saved": lora(modules_to_save=["wte", "lm_head"]),
    "head and embeddings saved as one": lora(
        modules_to_save=["wte", "lm_head"], ensure_weight_tying=True),
    "norms saved": lora(modules_to_save=["ln_1", "ln_f"]),
    "embeddings": lora(target_modules=["wte", "wpe"]),
    "head": lora(target_modules=["lm_head", "c_fc"]),
    "dora of the head": lora(target_modules=["lm_head", "c_fc"], use_dora=True),
}  # fmt: skip
REFUSED = {
    "dora of embeddings": (lora(target_modules=["wte"], use_dora=True), "lora_magnitude_vector"),
    "embeddings tied": (lora(target_modules=["wte"], ensure_weight_tying=True), "ensure_weight_ty"),
    "lora_bias": (lora(lora_bias=True), "lora_bias is True"),
    "some tokens": (lora(trainable_token_indices=[3]), "trainable_token_indices is"),
    "pissa": (lora(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    "olora": (lora(init_lora_weights="olora"), "init_lora_weights is 'olora'"),
    "alora": (lora(alora_invocation_tokens=[3]), "alora_invocation_tokens is [3]"),
    **{
        config.peft_type.value: (config, f"peft_type is '{config.peft_type.value}'")
        for config in (
            peft.IA3Config(task_type="CAUSAL_LM"),
            peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=9),
            peft.LoHaConfig(target_modules=["c_fc"]),
            peft.LoKrConfig(target_modules=["c_fc"]),
            peft.OFTConfig(target_modules=["c_fc"], oft_block_size=4),
            peft.BOFTConfig(target_modules=["c_fc"]),
            peft.VeraConfig(target_modules=["c_fc"]),
            peft.FourierFTConfig(target_modules=["c_fc"], n_frequency=9),
            peft.HRAConfig(target_modules=["c_fc"]),
            peft.LNTuningConfig(target_modules=["ln_1"]),
            peft.TrainableTokensConfig(token_indices=[3], target_modules=["wte"]),
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        )
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of a model of each family, whose parameters are all of some size."""
    return write_bases(tmp_path_factory.mktemp("bases"), 0.1)


def write(base, family, config, folder, **options):
    """Writes an adapter as if it were trained; returns the model with it."""
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(read_base(base, family), config).eval()
        disturb(model, 0.1)
        model.save_pretrained(folder, **options)
    return model


def adapted(base, family, config, folder, **options):
    """Writes an adapter; returns the logits of the model with it."""
    model = write(base, family, config, folder, **options)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def logits(lm):
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lm.model.apply)
        return np.asarray(run({"params": lm.params}, jnp.asarray(TOKENS)).logits)


def config_of(name, kinds=EQUAL):
    """A copy: PEFT fills in what a config leaves out, by the model."""
    found = kinds[name]
    return type(found)(**{k: v for k, v in found.to_dict().items() if k != "peft_type"})


def assert_equal(found, expected, plain):
    assert np.abs(found - plain).max() > 0.2
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def adapter(bases, tmp_path_factory):
    """A folder of a plain adapter."""
    folder = tmp_path_factory.mktemp("adapter")
    write(bases, "neo", config_of("plain"), folder)
    return folder


@pytest.fixture(scope="module")
def plain(bases):
    return {family: logits(neo_jax.load(bases / family)) for family in FAMILIES}


_BOTH = ("plain", "dora", "all biases")
_CASES = [(name, family) for i, name in enumerate(EQUAL) for j, family in enumerate(FAMILIES)
          if name in _BOTH or (i + j) % 2]  # fmt: skip


@pytest.mark.parametrize(("name", "family"), _CASES)
def test_logits_are_those_of_peft(bases, plain, tmp_path, name, family):
    expected = adapted(bases, family, config_of(name), tmp_path)
    assert_equal(logits(neo_jax.load(tmp_path)), expected, plain[family])


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(bases, tmp_path, name):
    message = REFUSED[name][1]
    kinds = {name: config for name, (config, _) in REFUSED.items()}
    write(bases, "neo", config_of(name, kinds), tmp_path)
    with pytest.raises(NeoError) as error:
        neo_jax.load(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "merge_and_unload" in str(error.value)


@pytest.mark.parametrize("name", ["rslora with patterns", "dora"])
def test_on_a_mesh(bases, plain, tmp_path, name):
    expected = adapted(bases, "gpt2", config_of(name), tmp_path)
    lm = neo_jax.load(tmp_path, mesh="fsdp=2,model=2")
    assert_equal(logits(lm), expected, plain["gpt2"])
    kernel = lm.params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_a_new_head_on_a_mesh(bases, plain, tmp_path):
    expected = adapted(bases, "neo", config_of("head saved"), tmp_path)
    lm = neo_jax.load(tmp_path, mesh="fsdp=2,model=2")
    assert not lm.config.tied_head
    assert_equal(logits(lm), expected, plain["neo"])
    tables = lm.params["lm_head"]["embedding"], lm.params["wte"]["embedding"]
    assert tables[0].sharding == tables[1].sharding


@pytest.mark.parametrize("name", ["dora", "head and embeddings saved"])
def test_adapters_in_a_bin_file(bases, plain, tmp_path, name):
    expected = adapted(bases, "neo", config_of(name), tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert_equal(logits(neo_jax.load(tmp_path)), expected, plain["neo"])
    assert describe_adapter(tmp_path)["rank"] == 4


def test_int8_of_a_model_with_a_new_head(bases, plain, tmp_path):
    expected = adapted(bases, "neo", config_of("head saved"), tmp_path)
    found = logits(neo_jax.load(tmp_path, quantize="int8"))
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_tied_tables_stay_one(bases, tmp_path):
    write(bases, "neo", config_of("head and embeddings saved as one"), tmp_path)
    assert neo_jax.load(tmp_path).config.tied_head


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_pattern": [1]}, "rank_pattern is [1], not numbers by names"),
        ({"rank_pattern": {"c_fc": "2"}}, "rank_pattern of c_fc must be a whole number, not '2'"),
        ({"rank_pattern": {"c_fc": 0}}, "rank_pattern of c_fc 0 must lie between 1 and"),
        ({"alpha_pattern": {"c_fc": float("nan")}}, "alpha_pattern of c_fc nan must be finite"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern has '(', no name or simple pattern"),
        ({"rank_pattern": {"(a+)+x": 2}}, "rank_pattern has '(a+)+x', no name or simple pattern"),
        ({"alpha_pattern": {".*.*.*.*x": 2}}, "alpha_pattern has '.*.*.*.*x', no name or simple"),
        ({"alpha_pattern": {"x" * 300: 2}}, "no name or simple pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj.lora_A.weight is float32 [4, 32], not of"),
        ({"use_dora": True}, "lacks base_model.model.transformer.h.0.attn.attention.q_proj.lora_m"),
    ],
)
def test_fields_that_cannot_be(adapter, tmp_path, fields, message):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | fields))
    with pytest.raises(NeoError) as error:
        neo_jax.load(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_norms_that_the_config_does_not_speak_of(bases, tmp_path):
    write(bases, "neo", config_of("dora"), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_dora": False}))
    with pytest.raises(NeoError, match=r"holds the tensor .*lora_magnitude_vector; this loads"):
        neo_jax.load(tmp_path)
