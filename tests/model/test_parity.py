"""model/transformer.py against transformers: GPT-Neo and GPT-2 with eager attention.

The yardstick is the reference's own noise, its float32 against its float64 result.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM
from transformers.models.gpt_neo import modeling_gpt_neo

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import attention

pytestmark = [pytest.mark.core, pytest.mark.optimized]

ANYWHERE = ("dense", "blocked")  # the kernels that run on every device
CONFIGS = {
    "global-local": ModelConfig(
        num_layers=2, embed_dim=64, num_heads=4, vocab_size=97, max_length=64, window_size=8
    ),
    "wide": ModelConfig(
        num_layers=2, embed_dim=1024, num_heads=8, vocab_size=128, max_length=64, window_size=16
    ),
    "global-global-local": ModelConfig(
        num_layers=3,
        embed_dim=96,
        num_heads=3,
        mlp_dim=160,
        vocab_size=96,
        max_length=40,
        window_size=5,
        attention_types=("global", "global", "local"),
        activation="gelu",
        norm_epsilon=1e-3,
    ),
    "local": ModelConfig(
        num_layers=2,
        embed_dim=48,
        num_heads=1,
        vocab_size=96,
        max_length=32,
        window_size=3,
        attention_types=("local",),
        activation="relu",
    ),
    "gpt2": ModelConfig(
        num_layers=2,
        embed_dim=96,
        num_heads=4,  # heads of 24: the scale is no power of two
        vocab_size=97,
        max_length=64,
        window_size=8,  # of no layer
        attention_types=("global",),
        qkv_bias=True,
        scale_attention=True,
    ),
    "gpt2-untied": ModelConfig(
        num_layers=3,
        embed_dim=64,
        num_heads=2,
        mlp_dim=100,
        vocab_size=96,
        max_length=32,
        window_size=5,
        attention_types=("global",),
        qkv_bias=True,
        activation="gelu",
        tied_head=False,
    ),
}


class _Float64:
    """torch, but float32 is float64: the reference casts queries and keys to float32."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def reference(config, params):
    """The model of transformers with our parameters."""
    fields = config.to_hf() | {"bos_token_id": 0, "eos_token_id": 0}
    for derived in {"attention_layers", "architectures"} & fields.keys():
        del fields[derived]
    kind, theirs = GPTNeoForCausalLM, GPTNeoConfig
    if config.family.name == "gpt2":
        kind, theirs = GPT2LMHeadModel, GPT2Config
    model = kind._from_config(theirs(**fields), attn_implementation="eager")
    state = hf_state(config, params)
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert set(loaded.missing_keys) <= {"lm_head.weight"}
    return model.eval()


def hf_state(config, params):
    """Our parameters as tensors of transformers by their names."""
    leaves, parts = flatten_dict(params), {}
    for row in tensors(config):
        array = torch.tensor(np.array(row.to("hf", np.asarray(leaves[row.path]))))
        parts.setdefault(row.hf_name, (row.places["hf"].axis, []))[1].append(array)
    return {name: torch.cat(arrays, dim=axis) for name, (axis, arrays) in parts.items()}


def forward(model, dtype, tokens, **options):
    """Every hidden state, then the logits, as float64 arrays."""
    model = model.to(dtype)
    patch = mock.patch.object(modeling_gpt_neo, "torch", _Float64())
    with torch.no_grad(), patch if dtype == torch.float64 else torch.no_grad():
        output = model(torch.tensor(tokens), output_hidden_states=True, **options)
    assert output.logits.dtype == dtype
    return [x.double().numpy() for x in (*output.hidden_states, output.logits)]


def apply(model, params, tokens, positions=None):
    program = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    output = program(params, tokens, positions)
    return [np.asarray(x) for x in (*output.hidden_states, output.logits)]


def assert_parity(ours, single, exact, where=slice(None)):
    """No further from the exact result than twice the reference's float32, or 2e-6 of the std.

    By the root of the mean square. The largest error alone depends on which kernels a CPU has: it
    is allowed 4e-6 of the std.
    """
    assert len(ours) == len(exact)
    for mine, theirs, truth in zip(ours, single, exact, strict=True):
        assert mine.shape == truth.shape
        error, noise, spread = (mine - truth)[where], (theirs - truth)[where], truth[where].std()
        assert rms(error) <= 2 * rms(noise) + 2e-6 * spread
        assert np.abs(error).max() <= 2 * np.abs(noise).max() + 4e-6 * spread


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


@functools.cache
def case(name):
    """A configuration, its parameters and the reference; biases and norms are no zeros and ones."""
    config = CONFIGS[name]
    params = jax.jit(functools.partial(init_params, Neo(config)))(jax.random.key(1))
    rng = np.random.default_rng(2)
    leaves = flatten_dict(params)
    for path, leaf in leaves.items():
        if path[-1] in ("scale", "bias"):
            leaves[path] = leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32)
    params = unflatten_dict(leaves)
    return config, params, reference(config, params)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Makes short sequences long enough for several blocks."""
    monkeypatch.setitem(
        attention.KERNELS, "blocked", functools.partial(attention.blocked, block_size=10)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_hidden_states_equal_transformers(name):
    config, params, theirs = case(name)
    window = config.window_size
    longest = 3 * window + 7
    for length in (1, window - 1, window, window + 1, longest):
        tokens = np.random.default_rng(length).integers(0, config.vocab_size, (2, length))
        single = forward(theirs, torch.float32, tokens)
        exact = forward(theirs, torch.float64, tokens)
        for kernel in (*ANYWHERE, "auto") if length == longest else ANYWHERE:
            assert_parity(apply(Neo(config, kernel=kernel), params, tokens), single, exact)


@pytest.mark.parametrize(
    ("name", "kernel"), [*(("global-local", kernel) for kernel in ANYWHERE), ("gpt2", "auto")]
)
def test_left_padding_equals_transformers(name, kernel):
    config, params, theirs = case(name)
    length, lengths = 29, [29, 3, 17, 8]
    rng = np.random.default_rng(0)
    mask = np.arange(length) >= length - np.array(lengths)[:, None]
    tokens = rng.integers(0, config.vocab_size, mask.shape)
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1)
    options = {
        "attention_mask": torch.tensor(mask.astype(int)),
        "position_ids": torch.tensor(np.maximum(positions, 0)),
    }
    single = forward(theirs, torch.float32, tokens, **options)
    exact = forward(theirs, torch.float64, tokens, **options)
    ours = apply(Neo(config, kernel=kernel), params, tokens, positions)
    assert_parity(ours, single, exact, where=mask)
    assert all(np.isfinite(x).all() for x in ours)


@pytest.mark.parametrize("name", ["global-global-local", "gpt2", "gpt2-untied"])
def test_a_saved_model_loads_in_transformers(tmp_path, name):
    config, params, theirs = case(name)
    save_pretrained(tmp_path, config, params)
    loaded, info = type(theirs).from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 22))
    saved = forward(loaded.eval(), torch.float32, tokens)
    single = forward(theirs, torch.float32, tokens)
    for one, other in zip(saved, single, strict=True):
        np.testing.assert_array_equal(one, other)
    exact = forward(theirs, torch.float64, tokens)
    assert_parity(apply(Neo(config), params, tokens), saved, exact)


@pytest.mark.parametrize("name", ["global-local", "gpt2-untied"])
def test_the_loss_gradient_equals_transformers(name):
    """Every parameter's gradient of the mean loss, to the parity bar."""
    config, params, theirs = case(name)
    tokens = np.random.default_rng(5).integers(0, config.vocab_size, (2, 19))

    def loss(params, tokens):
        logprobs = jax.nn.log_softmax(Neo(config).apply({"params": params}, tokens).logits[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    ours = flatten_dict(jax.jit(jax.grad(loss))(params, tokens))

    def gradients(dtype):
        model = theirs.to(dtype)
        model.zero_grad()
        patch = mock.patch.object(modeling_gpt_neo, "torch", _Float64())
        with patch if dtype == torch.float64 else torch.enable_grad():
            logits = model(torch.tensor(tokens)).logits[:, :-1]
        targets = torch.tensor(tokens[:, 1:]).flatten()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
        return {name: p.grad.double().numpy() for name, p in model.named_parameters()}

    single, exact = gradients(torch.float32), gradients(torch.float64)
    for key, mine in hf_state(config, unflatten_dict(ours)).items():
        assert_parity([mine.numpy()], [single[key]], [exact[key]])
