"""Products and gradients whose parameter is split over the devices of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_layouts import STRATEGIES, placed

from neo_jax.model.layers import einsum
from neo_jax.sharding.rules import make_sharding


@pytest.mark.parametrize(("mesh", "rules"), STRATEGIES)
@pytest.mark.parametrize(
    ("equation", "axes", "shape"),
    [
        ("btd,nhd->btnh", ("heads", "head_dim", "embed"), (8, 2, 16)),
        ("btnh,dnh->btd", ("embed", "heads", "head_dim"), (16, 8, 2)),
        ("btd,vd->btv", ("vocab", "embed"), (24, 16)),
    ],
)
def test_products_and_their_gradients(mesh, rules, equation, axes, shape, cut, rng):
    sharding = make_sharding(mesh, rules)
    x = rng.standard_normal((8, 4, 8, 2) if "btnh," in equation else (8, 4, 16), np.float32)
    weight = rng.standard_normal(shape, np.float32)

    def value(x, weight, product):
        return jnp.sum(jnp.sin(product(x, weight)))

    def plain(x, weight):
        return jnp.einsum(equation, x, weight, precision="highest")

    def split(x, weight):
        return einsum(equation, x, weight, jnp.float32, sharding, axes)

    gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1)), static_argnums=2)
    expected = gradients(x, weight, plain)
    x = placed(sharding, ("batch", *[None] * (x.ndim - 1)), x)
    actual = gradients(x, placed(sharding, axes, weight), split)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
