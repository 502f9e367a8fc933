import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neo_jax.axes import LOGICAL_AXES
from neo_jax.config import ModelConfig, preset
from neo_jax.names import tensors

SMALL = ModelConfig(num_layers=2, embed_dim=32, num_heads=4, vocab_size=97, max_length=64)
PATTERN = dataclasses.replace(
    SMALL, num_layers=3, mlp_dim=48, attention_types=("global", "global", "local")
)


@pytest.mark.parametrize("config", [SMALL, PATTERN])
def test_table_is_the_state_dict_of_transformers(config):
    fields = config.to_hf() | {"bos_token_id": 0, "eos_token_id": 0}
    for derived in ("attention_layers", "architectures"):
        del fields[derived]
    theirs = {
        name: tuple(tensor.shape)
        for name, tensor in GPTNeoForCausalLM(GPTNeoConfig(**fields)).state_dict().items()
    }
    assert theirs.pop("lm_head.weight") == theirs["transformer.wte.weight"]
    assert {row.hf_name: row.hf_shape for row in tensors(config)} == theirs


@pytest.mark.parametrize("config", [SMALL, PATTERN, preset("gpt-neo-2.7b")])
def test_every_parameter_has_one_row(config):
    rows = tensors(config)
    assert len({row.path for row in rows}) == len({row.hf_name for row in rows}) == len(rows)
    assert sum(int(np.prod(row.hf_shape)) for row in rows) == config.num_params
    for row in rows:
        assert len(row.axes) == len(row.shape)
        assert set(row.axes) <= set(LOGICAL_AXES)
        assert np.prod(row.stored_shape) == np.prod(row.hf_shape)
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
    matrix = rng.normal(size=row.hf_shape)
    ours = np.einsum("D,DNH->NH", x, row.from_hf(matrix))
    np.testing.assert_allclose(ours, (matrix @ x).reshape(4, 8), rtol=1e-12)

    row = rows["h_1/attn/out_proj/kernel"]
    matrix = rng.normal(size=row.hf_shape)
    ours = np.einsum("NH,NHD->D", x.reshape(4, 8), row.from_hf(matrix))
    np.testing.assert_allclose(ours, matrix @ x, rtol=1e-12)

    row = rows["h_1/mlp/c_fc/kernel"]
    matrix = rng.normal(size=row.hf_shape)
    np.testing.assert_allclose(x @ row.from_hf(matrix), matrix @ x, rtol=1e-12)


@given(
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 5),
    mlp=st.integers(1, 9),
    vocab=st.integers(1, 9),
    length=st.integers(1, 9),
)
def test_both_ways_are_views_and_inverse(heads, head_dim, mlp, vocab, length):
    config = ModelConfig(
        num_layers=1,
        embed_dim=heads * head_dim,
        num_heads=heads,
        mlp_dim=mlp,
        vocab_size=vocab,
        max_length=length,
        attention_types=("local",),
    )
    for row in tensors(config):
        theirs = np.arange(np.prod(row.hf_shape)).reshape(row.hf_shape)
        ours = row.from_hf(theirs)
        assert ours.shape == row.stored_shape
        assert np.shares_memory(ours, theirs)
        contiguous = np.full(row.shape, -1)  # what is padding must not come back
        contiguous[: len(ours)] = ours
        back = row.to_hf(contiguous)
        assert np.shares_memory(back, contiguous)
        np.testing.assert_array_equal(back, theirs)
