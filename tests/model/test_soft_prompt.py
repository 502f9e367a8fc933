"""model/soft_prompt.py: embeddings in the place of tokens' do what the tokens do, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.model.declared import logical_axes
from neo_jax.model.soft_prompt import PROMPT, soft_prompt_ids, text_context
from neo_jax.model.transformer import Neo, init_params

WORDS = np.array([[5, 9, 70, 9], [1, 2, 3, 4]])
TEXT = np.random.default_rng(0).integers(0, 96, (2, 20))


@pytest.fixture(scope="module")
def both(tiny):
    """Logits of words and text, and of the text behind the embeddings of the words."""
    model, params = tiny
    run = jax.jit(model.apply)
    return run({"params": params}, np.concatenate([WORDS, TEXT], 1)).logits


def test_a_prefix_in_the_place_of_tokens(tiny, both):
    model, params = tiny
    prefix = params["wte"]["embedding"][WORDS]
    ids = jnp.asarray(np.concatenate([0 * WORDS, TEXT], 1))
    found = jax.jit(lambda p, *x: model.apply({"params": p}, *x[:1], prefix=x[1]).logits)(
        params, ids, prefix
    )
    np.testing.assert_array_equal(found, both)


def test_virtual_tokens_in_rows_of_any_padding(tiny, both):
    model, params = tiny
    table = params["wte"]["embedding"][WORDS.reshape(-1)]
    virtual = model.clone(virtual_tokens=8)
    ids = np.concatenate([96 + np.arange(8).reshape(2, 4), TEXT], 1)
    run = jax.jit(lambda p, *x: virtual.apply({"params": p}, *x).logits)
    soft = params | {PROMPT: table}
    np.testing.assert_array_equal(run(soft, ids, None), both)
    padded = np.pad(ids, ((0, 0), (3, 0)))
    positions = np.broadcast_to(np.maximum(np.arange(27) - 3, -1), (2, 27))
    found = run(soft, padded, positions)[:, 3:]
    np.testing.assert_allclose(found, both, rtol=0, atol=1e-5 * np.abs(both).max())


def test_the_table_is_a_parameter(tiny):
    model = tiny[0].clone(virtual_tokens=3, soft_prompt=2)
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    assert params[PROMPT].shape == (3, 32)
    assert params.keys() - tiny[1].keys() == {PROMPT}
    assert logical_axes(model)[PROMPT] == ("virtual", "features")
    assert soft_prompt_ids(model) == [96, 97]
    assert text_context(model) == 62
    assert isinstance(model, Neo)
