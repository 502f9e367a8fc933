"""GPT-2 by the modules of GPT-Neo: all that is done with a model works for it too."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from peft import LoraConfig as PeftLora
from peft import PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from neo_jax.checkpoints.peft import load_adapter, save_adapter
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.decode.options import SamplingOptions
from neo_jax.model.flops import flops_per_token
from neo_jax.model.scan import stack, unstack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding
from neo_jax.text.load import load
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.next_token import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import init_state, make_step
from neo_jax.transforms.lora import LoraConfig, add_adapters, init_adapters, merge

pytestmark = pytest.mark.optimized

GREEDY = SamplingOptions(temperature=0)
CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    vocab_size=97,
    max_length=48,
    attention_types=("global",),
    eos_token_id=-1,
    qkv_bias=True,
    scale_attention=True,
    tied_head=False,
)


@pytest.fixture(scope="module")
def params():
    """Wider than at the start, so that each token depends on all before; biases are no zeros."""
    drawn = jax.jit(functools.partial(init_params, Neo(CONFIG)))(jax.random.key(0))
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda leaf: 5 * leaf + 0.1 * rng.normal(size=leaf.shape), drawn)
    for name in ("wte", "lm_head"):
        drawn[name]["embedding"] = drawn[name]["embedding"].at[CONFIG.vocab_size :].set(0)
    return drawn


@pytest.fixture(scope="module")
def folder(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    save_pretrained(path, CONFIG, params)
    return path


def test_greedy_texts_equal_those_of_transformers(folder):
    prompts = [[5, 9, 3, 1, 44], [7], list(range(20))]
    theirs = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    for options in ({}, {"mesh": "data=4,model=2", "rules": "tensor"}):
        lm = load(folder, **options)
        assert lm.config == CONFIG
        for prompt, sample in zip(prompts, lm.sample(prompts, 20, sampling=GREEDY), strict=True):
            expected = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
            )
            assert sample.ids == expected[0, len(prompt) :].tolist()
    scores = lm.score([list(range(40))])[0]
    with torch.no_grad():
        logits = theirs(torch.arange(40)[None]).logits[0, :-1]
    expected = torch.log_softmax(logits, -1)[torch.arange(39), torch.arange(1, 40)]
    np.testing.assert_allclose(scores.logprobs, expected.numpy(), atol=2e-5)


def test_how_it_is_drawn():
    """As in the paper: 0.02, what ends a branch divided by the root of their number; no biases."""
    config = dataclasses.replace(CONFIG, num_layers=8, embed_dim=128, head_dim=64)
    drawn = jax.jit(functools.partial(init_params, Neo(config)))(jax.random.key(1))
    for path, leaf in flatten_dict(drawn).items():
        name = path[-2]
        if path[-1] == "bias":
            assert not leaf.any()
        elif path[-1] in ("kernel", "embedding"):
            leaf = leaf[: config.vocab_size] if name in ("wte", "lm_head") else leaf
            expected = {"out_proj": 0.005, "c_proj": 0.005, "wpe": 0.01}.get(name, 0.02)
            np.testing.assert_allclose(leaf.std(), expected, rtol=0.05, err_msg=str(path))


def test_flops_count_what_multiplies():
    tied = dataclasses.replace(CONFIG, tied_head=True)
    assert flops_per_token(CONFIG, 16) == flops_per_token(tied, 16)
    kernels = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 97 * 32
    assert flops_per_token(CONFIG, 1) == pytest.approx(6 * kernels, rel=0.1)


def test_it_trains_on_a_mesh_as_on_one_device(params):
    """Loss and parameters after steps of AdamW, stacked, with both strategies that split them."""
    config = TrainConfig(
        data="", output="", steps=3, batch_size=8, model=CONFIG, length=24, dtype="float32",
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1),
    )  # fmt: skip
    tokens = np.random.default_rng(3).integers(0, 97, (8, 25)).astype(np.int32)
    batch = Batch(tokens, np.ones((8, 24), np.float32))
    results = []
    for mesh in ("", "data=2,fsdp=2,model=2"):
        model = Neo(CONFIG, sharding=make_sharding(mesh, "fsdp+tensor" if mesh else ""))
        optimizer = make_optimizer(config.optimizer, config.steps)
        step, state = make_step(model, optimizer, config), init_state(model, optimizer, 0)
        losses = []
        for _ in range(3):
            state, metrics = step(state, batch, None)
            losses.append(float(metrics["loss"]))
        results.append((losses, jax.tree.map(np.asarray, unstack(state.params, CONFIG))))
        if mesh:
            spec = model.sharding.spec(("vocab", "embed"), (128, 32), "lm_head")
            assert state.params["lm_head"]["embedding"].sharding.spec == spec
    (first, alone), (second, split) = results
    assert first[0] > first[-1]
    np.testing.assert_allclose(first, second, rtol=1e-5)
    for path, leaf in flatten_dict(alone).items():
        np.testing.assert_allclose(flatten_dict(split)[path], leaf, atol=1e-4, err_msg=str(path))
    assert (alone["lm_head"]["embedding"][97:] == 0).all()
    stacked = stack(params, CONFIG)
    assert "lm_head" in stacked
    for path, leaf in flatten_dict(unstack(stacked, CONFIG)).items():
        np.testing.assert_array_equal(leaf, flatten_dict(params)[path])


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "c_proj"), ("out_proj", "k_proj")])
def test_peft_reads_our_adapters(folder, tmp_path, targets):
    lora = LoraConfig(rank=3, alpha=5.0, targets=targets)
    stacked = init_adapters(CONFIG, lora, jax.random.key(1))
    stacked = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape) / 5,
                           stacked)  # fmt: skip
    lm = load(folder)
    canonical = unstack(add_adapters(stack(lm.params, CONFIG), stacked, lora.scale), CONFIG)
    save_adapter(tmp_path, CONFIG, lora, canonical, base=str(folder))
    merged = merge(canonical)
    tokens = jnp.arange(2 * 20).reshape(2, 20)
    ours = lm.model.apply({"params": merged}, tokens).logits
    plain = lm.model.apply({"params": lm.params}, tokens).logits
    assert np.abs(ours - plain).max() > 0.1

    base = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.arange(2 * 20).reshape(2, 20)).logits.numpy()
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
    again = load(tmp_path)
    np.testing.assert_allclose(
        again.model.apply({"params": again.params}, tokens).logits, ours, atol=1e-4
    )


def test_we_read_adapters_that_peft_wrote(folder, tmp_path):
    torch.manual_seed(0)
    base = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager")
    lora = PeftLora(r=2, lora_alpha=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True,
                    init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    theirs = get_peft_model(base, lora).eval()
    theirs.save_pretrained(tmp_path)
    changes = load_adapter(tmp_path, CONFIG).changes
    assert {change.scale for change in changes.values()} == {1.5}
    names = {path[-2] for path in changes}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "c_proj"}
    tokens = jnp.arange(2 * 20).reshape(2, 20)
    with torch.no_grad():
        expected = theirs(torch.arange(2 * 20).reshape(2, 20)).logits.numpy()
    lm = load(tmp_path)
    ours = lm.model.apply({"params": lm.params}, tokens).logits
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())
