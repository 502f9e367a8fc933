"""Products, gradients and look-ups whose parameter is split over the devices of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.devices import torus
from neo_jax.model.layers import einsum
from neo_jax.ops.embedding import embedding_lookup
from neo_jax.sharding.fsdp import FsdpLayout
from neo_jax.sharding.rules import make_sharding

STRATEGIES = [
    ("data=8", "data"),
    ("fsdp=8", "fsdp"),
    ("model=8", "tensor"),
    ("fsdp=4,model=2", "fsdp+tensor"),
    ("data=2,fsdp=2,model=2", "fsdp+tensor"),
    ("fsdp=4,model=2", "embed:fsdp+model,batch:fsdp"),  # one axis by both
    ("fsdp=4,model=2", "embed:model+fsdp,batch:fsdp"),
    ("fsdp=8", "vocab:fsdp,heads:fsdp"),
    ("fsdp=4,context=2", "embed:fsdp,length:context"),
    ("fsdp=2,model=4", "embed:fsdp,length:model,heads:model,vocab:model"),
]


@pytest.fixture(params=["one axis", "along a torus"])
def cut(request, monkeypatch):
    """Meshes as a CPU's devices give them, and as if an axis of 4 spanned two of a torus."""
    torus.along_torus.cache_clear()
    if request.param == "along a torus":
        monkeypatch.setattr(torus, "_torus_sizes", lambda n: (2, 2) if len(n) == 4 else (len(n),))
    yield
    torus.along_torus.cache_clear()


def lies(sharding, axes, array):
    return jax.device_put(array, sharding.named(axes, array.shape))


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
    x = lies(sharding, ("batch", *[None] * (x.ndim - 1)), x)
    actual = gradients(x, lies(sharding, axes, weight), split)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("mesh", "rules"), STRATEGIES)
def test_rows_and_their_gradients(mesh, rules, cut, rng):
    sharding = make_sharding(mesh, rules)
    layout = FsdpLayout.of(sharding, ("vocab", "embed"))
    table = rng.standard_normal((24, 16), np.float32)
    ids = rng.integers(-2, 27, (8, 4), np.int32)  # some outside of the table

    def value(table, ids, layout):
        return jnp.sum(jnp.sin(embedding_lookup(layout, table, ids)))

    def plain(table, ids):
        return jnp.sum(jnp.sin(jnp.take(table, ids, axis=0, mode="clip")))

    expected = jax.value_and_grad(plain)(table, ids)
    whole = jax.value_and_grad(value)(table, ids, FsdpLayout.of(None, ("vocab", "embed")))
    table = lies(sharding, ("vocab", "embed"), table)
    ids = lies(sharding, ("batch", None), ids)
    actual = jax.jit(jax.value_and_grad(value), static_argnums=2)(table, ids, layout)
    for result in (whole, actual):
        np.testing.assert_allclose(result[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(result[1], expected[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        jax.jit(embedding_lookup, static_argnums=0)(layout, table, ids),
        jnp.take(table, ids, axis=0, mode="clip"),
    )


def test_few_tokens_are_not_split(rng):
    layout = FsdpLayout.of(
        make_sharding("fsdp=4,context=2", "embed:fsdp,length:context"), ["vocab", "embed"]
    )
    table = rng.standard_normal((24, 16), np.float32)
    ids = rng.integers(0, 24, (8, 1), np.int32)
    np.testing.assert_array_equal(embedding_lookup(layout, table, ids), table[ids])
