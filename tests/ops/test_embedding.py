"""ops/embedding.py: rows of a table that is sharded in any way, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_layouts import STRATEGIES, placed

from neo_jax.ops.embedding import embedding_lookup
from neo_jax.sharding.fsdp import FsdpLayout
from neo_jax.sharding.rules import make_sharding


@pytest.mark.parametrize(("mesh", "rules"), STRATEGIES)
def test_rows_and_their_gradients(mesh, rules, cut, rng):
    sharding = make_sharding(mesh, rules)
    layout = FsdpLayout.of(sharding, ("vocab", "embed"))
    table = jnp.asarray(rng.standard_normal((24, 16), np.float32))
    ids = jnp.asarray(rng.integers(-2, 27, (8, 4), np.int32))  # some outside of the table

    def value(table, ids, layout):
        return jnp.sum(jnp.sin(embedding_lookup(layout, table, ids)))

    def plain(table, ids):
        return jnp.sum(jnp.sin(jnp.take(table, ids, axis=0, mode="clip")))

    expected = jax.value_and_grad(plain)(table, ids)
    whole = jax.value_and_grad(value)(table, ids, FsdpLayout.of(None, ("vocab", "embed")))
    table = placed(sharding, ("vocab", "embed"), table)
    ids = placed(sharding, ("batch", None), ids)
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
    table = jnp.asarray(rng.standard_normal((24, 16), np.float32))
    ids = jnp.asarray(rng.integers(0, 24, (8, 1), np.int32))
    np.testing.assert_array_equal(embedding_lookup(layout, table, ids), table[ids])
