import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

from neo_jax.axes import LOGICAL_AXES
from neo_jax.config import ModelConfig, preset
from neo_jax.model.tensor_table import tensors

SMALL = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, vocab_size=97, max_length=64)
PATTERN = dataclasses.replace(
    SMALL, num_layers=3, mlp_dim=48, attention_types=("global", "global", "local")
)
GPT2 = dataclasses.replace(
    SMALL, attention_types=("global",), qkv_bias=True, scale_attention=True, mlp_dim=48
)
UNTIED = dataclasses.replace(GPT2, tied_head=False)


@pytest.mark.parametrize(
    "config", [SMALL, PATTERN, GPT2, UNTIED, dataclasses.replace(SMALL, tied_head=False)]
)
def test_table_is_the_state_dict_of_transformers(config):
    fields = config.to_hf() | {"bos_token_id": 0, "eos_token_id": 0}
    for derived in {"attention_layers", "architectures"} & fields.keys():
        del fields[derived]
    if config.family.name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**fields))
    else:
        model = GPTNeoForCausalLM(GPTNeoConfig(**fields))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tied_head:
        assert theirs.pop("lm_head.weight") == theirs["transformer.wte.weight"]
    assert {row.hf_name: row.places["hf"].whole for row in tensors(config)} == theirs


@pytest.mark.parametrize("config", [SMALL, PATTERN, preset("gpt-neo-2.7b"), UNTIED])
def test_every_parameter_has_one_row(config):
    rows = tensors(config)
    names = {(row.hf_name, row.places["hf"].part) for row in rows}
    assert len({row.path for row in rows}) == len(names) == len(rows)
    assert sum(int(np.prod(row.places["hf"].shape)) for row in rows) == config.num_params
    for row in rows:
        assert len(row.axes) == len(row.shape)
        assert set(row.axes) <= set(LOGICAL_AXES)
        assert np.prod(row.stored_shape) == np.prod(row.places["hf"].shape)
        assert (row.shape == row.stored_shape) == ("vocab" not in row.axes)
    assert rows[0].shape == (config.padded_vocab_size, config.embed_dim)


def test_rows_come_in_model_order():
    paths = ["/".join(row.path) for row in tensors(SMALL)]
    assert paths[:2] == ["wte/embedding", "wpe/embedding"]
    assert paths[2:15] == [path.replace("h_1", "h_0") for path in paths[15:28]]
    assert paths[28:] == ["ln_f/scale", "ln_f/bias"]


def test_kernels_mean_what_torch_linear_means():
    """Our einsum over the kernel is torch's product with the transposed matrix, heads split."""
    rows = {"/".join(row.path): row for row in tensors(SMALL)}
    rng = np.random.default_rng(0)
    x = rng.normal(size=32)

    row = rows["h_1/attn/q_proj/kernel"]
    matrix = rng.normal(size=row.places["hf"].shape)
    ours = np.einsum("D,NHD->NH", x, row.of("hf", matrix))
    np.testing.assert_allclose(ours, (matrix @ x).reshape(4, 8), rtol=1e-12)

    row = rows["h_1/attn/out_proj/kernel"]
    matrix = rng.normal(size=row.places["hf"].shape)
    ours = np.einsum("NH,DNH->D", x.reshape(4, 8), row.of("hf", matrix))
    np.testing.assert_allclose(ours, matrix @ x, rtol=1e-12)

    row = rows["h_1/mlp/c_fc/kernel"]
    matrix = rng.normal(size=row.places["hf"].shape)
    np.testing.assert_allclose(row.of("hf", matrix) @ x, matrix @ x, rtol=1e-12)


def test_names_of_flax_and_of_mesh_tensorflow():
    """Those of the models that transformers 4 had for Flax, and of EleutherAI/gpt-neo."""
    rows = {"/".join(row.path): row.places for row in tensors(SMALL)}
    for path, flax, mesh_tf, shape in (
        ("wte/embedding", "transformer/wte/embedding", "gpt2/wte", (97, 32)),
        ("h_1/ln_1/scale", "transformer/h/1/ln_1/scale", "gpt2/h1/norm_1/g", (32,)),
        ("h_1/attn/q_proj/kernel", "transformer/h/1/attn/attention/q_proj/kernel",
         "gpt2/h1/attn/q", (32, 32)),
        ("h_0/attn/out_proj/bias", "transformer/h/0/attn/attention/out_proj/bias",
         "gpt2/h0/attn/compute_output_bias/o_b", (32,)),
        ("h_0/mlp/c_fc/kernel", "transformer/h/0/mlp/c_fc/kernel",
         "gpt2/h0/mlp/conv1d_main/c_fc/kernel", (32, 128)),
        ("ln_f/bias", "transformer/ln_f/bias", "gpt2/ln_f/b", (32,)),
    ):  # fmt: skip
        assert (rows[path]["flax"].name, rows[path]["mesh_tf"].name) == (flax, mesh_tf)
        assert rows[path]["flax"].whole == rows[path]["mesh_tf"].whole == shape
    rows = {"/".join(row.path): row.places for row in tensors(UNTIED)}
    assert not any("mesh_tf" in places for places in rows.values())
    for path, flax, shape in (
        ("h_1/attn/v_proj/kernel", "transformer/h/1/attn/c_attn/kernel", (96, 32)),
        ("h_1/attn/v_proj/bias", "transformer/h/1/attn/c_attn/bias", (96,)),
        ("h_1/attn/out_proj/kernel", "transformer/h/1/attn/c_proj/kernel", (32, 32)),
        ("h_1/mlp/c_fc/kernel", "transformer/h/1/mlp/c_fc/kernel", (48, 32)),
        ("lm_head/embedding", "lm_head/kernel", (32, 97)),
    ):
        assert (rows[path]["flax"].name, rows[path]["flax"].whole) == (flax, shape)


def test_kernels_mean_what_conv1d_means():
    """GPT-2's c_attn gives q, k and v beside each other, x times its matrix."""
    rows = {"/".join(row.path): row for row in tensors(GPT2)}
    rng = np.random.default_rng(0)
    x, matrix = rng.normal(size=32), rng.normal(size=(32, 96))
    for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
        kernel = rows[f"h_0/attn/{name}/kernel"].of("hf", matrix)
        ours = np.einsum("D,NHD->NH", x, kernel)
        np.testing.assert_allclose(ours, (x @ matrix).reshape(3, 4, 8)[part], rtol=1e-12)


@given(
    gpt2=st.booleans(),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 5),
    mlp=st.integers(1, 9),
    vocab=st.integers(1, 9),
    length=st.integers(1, 9),
)
def test_both_ways_are_views_and_inverse(gpt2, heads, head_dim, mlp, vocab, length):
    config = ModelConfig(
        num_layers=1,
        embed_dim=heads * head_dim,
        num_heads=heads,
        mlp_dim=mlp,
        vocab_size=vocab,
        max_length=length,
        attention_types=("global",) if gpt2 else ("local",),
        qkv_bias=gpt2,
        tied_head=not gpt2,
    )
    for row in tensors(config):
        for form, place in row.places.items():
            theirs = np.arange(np.prod(place.whole)).reshape(place.whole)
            ours = row.of(form, theirs)
            assert ours.shape == row.stored_shape
            assert np.shares_memory(ours, theirs)
            contiguous = np.full(row.shape, -1)  # what is padding must not come back
            contiguous[: len(ours)] = ours
            back = row.to(form, contiguous)
            assert np.shares_memory(back, contiguous)
            part = np.split(theirs, place.parts, axis=place.axis)[place.part]
            np.testing.assert_array_equal(back, part)
