"""model/layers.py: the modules that own parameters."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen as nn
from jax.nn.initializers import normal

from neo_jax.model.layers import Einsum, Embed, LayerNorm, einsum

pytestmark = pytest.mark.optimized


def assert_product(result, equation, x, y, tolerance=1e-6):
    """Compares with float64, relative to the sum of the magnitudes that were added up."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    error = np.abs(np.asarray(result, np.float64) - np.einsum(equation, x, y))
    assert (error <= tolerance * np.einsum(equation, abs(x), abs(y))).all()


def rounded(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


def test_einsum_adds_its_bias_along_the_last_axes(rng):
    module = Einsum((2, 3, 6), ("heads", "head_dim", "embed"), normal(1.0), ("heads", "head_dim"))
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    params = nn.meta.unbox(module.init(jax.random.key(0), "btd,nhd->btnh", x)["params"])
    assert jax.tree.map(jnp.shape, params) == {"kernel": (2, 3, 6), "bias": (2, 3)}
    assert not params["bias"].any()
    params["bias"] = jnp.arange(6.0).reshape(2, 3)
    y = module.apply({"params": params}, "btd,nhd->btnh", x)
    without = einsum("btd,nhd->btnh", x, params["kernel"], jnp.float32)
    np.testing.assert_array_equal(y, without + params["bias"][None, None])


def test_embed_looks_up_and_multiplies(rng):
    module = Embed(7, 4, "vocab", normal(1.0))
    ids = jnp.array([[0, 6, 3], [3, 3, 1]])
    params = nn.meta.unbox(module.init(jax.random.key(0), ids)["params"])
    table = np.asarray(params["embedding"])
    np.testing.assert_array_equal(module.apply({"params": params}, ids), table[np.asarray(ids)])
    outside = module.apply({"params": params}, jnp.array([[-1, 7]]))
    np.testing.assert_array_equal(outside, table[[[0, 6]]])

    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    logits = module.apply({"params": params}, x, method=Embed.attend)
    assert_product(logits, "btd,vd->btv", x, table)


def test_embed_adds_up_the_gradients_of_a_row():
    module = Embed(4, 2, "vocab", normal(1.0))
    ids = jnp.array([[1, 1, 3]])
    params = nn.meta.unbox(module.init(jax.random.key(0), ids)["params"])
    weights = jnp.array([[1.0, 10.0, 100.0]])[..., None]
    grads = jax.grad(lambda p: (module.apply({"params": p}, ids) * weights).sum())(params)
    np.testing.assert_array_equal(grads["embedding"][:, 0], [0, 11, 0, 100])


def test_embed_computes_the_head_in_its_dtype_and_looks_up_in_float32(rng):
    module = Embed(7, 4, "vocab", normal(1.0), jnp.bfloat16)
    params = {"embedding": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)}
    rows = module.apply({"params": params}, jnp.array([[2]]))
    np.testing.assert_array_equal(rows[0, 0], params["embedding"][2])
    x = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float32)
    logits = module.apply({"params": params}, x, method=Embed.attend)
    assert logits.dtype == jnp.float32
    assert_product(logits, "btd,vd->btv", rounded(x), rounded(params["embedding"]))


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_layer_norm_equals_torch(rng, epsilon):
    size = 64
    x = (rng.normal(size=(3, 5, size)) * [[[0.01]], [[1.0]], [[30.0]]] + 3).astype(np.float32)
    x[0, 0] = 7.0  # a row without variance
    grad = rng.normal(size=x.shape).astype(np.float32)
    scale, bias = rng.normal(size=(2, size)).astype(np.float32)
    theirs = torch.nn.LayerNorm(size, epsilon).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        theirs.bias.copy_(torch.tensor(bias))
    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = theirs(inputs)
    expected.backward(torch.tensor(grad, dtype=torch.float64))

    module = LayerNorm(epsilon)
    y, pull = jax.vjp(
        lambda params, x: module.apply({"params": params}, x), {"scale": scale, "bias": bias}, x
    )
    params_grad, x_grad = pull(jnp.asarray(grad))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[0, 0], bias, rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[1:], expected.detach()[1:], rtol=0, atol=3e-6)
    np.testing.assert_allclose(params_grad["bias"], theirs.bias.grad, rtol=0, atol=3e-6)
    # A spread of 0.01 around 3 leaves float32 four digits fewer.
    np.testing.assert_allclose(y[0], expected.detach()[0], rtol=0, atol=3e-4)
    assert np.isfinite(x_grad).all()
    for row in (1, 2):
        exact = inputs.grad[row].numpy()
        np.testing.assert_allclose(x_grad[row], exact, rtol=0, atol=3e-6 * abs(exact).max())


def test_layer_norm_is_float32_for_bfloat16(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.bfloat16)
    params = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    y = LayerNorm(1e-5).apply({"params": params}, x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(
        y, LayerNorm(1e-5).apply({"params": params}, x.astype(jnp.float32))
    )
