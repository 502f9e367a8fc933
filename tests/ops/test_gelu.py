"""GELU's tanh approximation against JAX's own, values and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.ops.gelu import ACTIVATIONS, gelu_new


def in_float64(f, x):
    with jax.enable_x64(True):
        return np.asarray(f(jnp.asarray(x, jnp.float64)))


def reference(x):
    return jax.nn.gelu(x, approximate=True)


def test_gelu_new_is_the_tanh_approximation():
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    np.testing.assert_allclose(gelu_new(x), in_float64(reference, x), rtol=1e-6, atol=3e-7)
    ours = jax.vmap(jax.grad(gelu_new))(x)
    theirs = in_float64(jax.vmap(jax.grad(reference)), x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_gelu_new_far_from_zero():
    x = jnp.array([-1e9, -1e4, -100.0, 100.0, 1e4, 1e9])
    np.testing.assert_array_equal(gelu_new(x), jnp.maximum(x, 0))
    np.testing.assert_array_equal(jax.vmap(jax.grad(gelu_new))(x), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_differentiate_forwards_and_backwards(name):
    f = ACTIVATIONS[name]
    x = jnp.linspace(-3, 3, 8)
    np.testing.assert_allclose(jax.jacfwd(f)(x), jax.jacrev(f)(x), atol=1e-6)
    assert f(x).dtype == x.dtype
