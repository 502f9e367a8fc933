"""ops/attention/single: one query a row against a cache, next to a float64 softmax and to dense."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.errors import NeoError
from neo_jax.ops.attention import Mask, attend, choose, dense, single
from neo_jax.ops.int8 import rounded

CPU, TPU = (types.SimpleNamespace(platform=platform) for platform in ("cpu", "tpu"))


def drawn(rng, rows, heads, slots, width):
    """A query, keys and values, and a mask whose slots hold positions in any order or none."""
    q = jnp.asarray(rng.normal(size=(rows, heads, 1, width)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(rows, heads, slots, width)), jnp.float32) for _ in "kv")
    positions = np.stack([rng.permutation(slots) for _ in range(rows)])
    positions[rng.random(positions.shape) < 0.2] = -1
    newest = positions.max(axis=1, keepdims=True).clip(0)
    positions[:, :1] = newest  # each query sees a key
    window = [None, 1, slots // 2][rng.integers(3)]
    return q, k, v, Mask(jnp.asarray(newest), jnp.asarray(positions), window)


def plain(q, k, v, mask):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.where(mask.visible()[:, None], q @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3),
    heads=st.integers(1, 3),
    slots=st.integers(1, 5).map(lambda n: 8 * n),
    width=st.sampled_from([8, 24, 64]),
)
@settings(max_examples=20)
def test_equals_softmax_in_float64(seed, rows, heads, slots, width):
    q, k, v, mask = drawn(np.random.default_rng(seed), rows, heads, slots, width)
    y = jax.jit(single)(q, k, v, mask)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, plain(q, k, v, mask), rtol=0, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_floats_are_read_as_float32(rng, dtype):
    q, k, v, mask = drawn(rng, 2, 3, 16, 24)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    expected = single(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(single(q, k, v, mask), expected, rtol=0, atol=2e-6)


def test_whole_numbers_take_their_scales(rng):
    q, k, v, mask = drawn(rng, 2, 3, 16, 24)
    k, v = rounded(k, 1), rounded(v, 1)
    expected = plain(q, k.dequantized(), v.dequantized(), mask)
    np.testing.assert_allclose(single(q, k, v, mask), expected, rtol=0, atol=5e-6)


def test_a_row_does_not_depend_on_others_nor_on_being_alone(rng):
    q, k, v, mask = drawn(rng, 3, 2, 24, 16)
    y = jax.jit(single)(q, k, v, mask)
    for row in range(3):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], (q, k, v, mask))
        np.testing.assert_array_equal(jax.jit(single)(*alone)[0], y[row])


def test_a_query_that_sees_nothing_gets_what_dense_gives(rng):
    q, k, v, mask = drawn(rng, 2, 2, 8, 8)
    blind = Mask(mask.q_positions, jnp.full_like(mask.k_positions, -1))
    np.testing.assert_allclose(single(q, k, v, blind), dense(q, k, v, blind), atol=2e-6)


@pytest.mark.parametrize(
    ("queries", "slots", "width", "device", "chosen"),
    [
        (1, 16, 8, CPU, "single"),
        (1, 16, 8, TPU, "dense"),
        (2, 16, 8, CPU, "dense"),
        (1, 17, 8, CPU, "dense"),
        (1, 16, 20, CPU, "dense"),
    ],
)
def test_auto_takes_it_where_it_can(queries, slots, width, device, chosen):
    mask = Mask(jnp.zeros((1, queries), int), jnp.zeros((1, slots), int))
    assert choose("auto", jnp.zeros((1, 2, queries, width)), mask, device) == chosen


@pytest.mark.parametrize(
    ("queries", "slots", "message"),
    [
        (2, 16, "'single' kernel serves one query a row, not 2; use 'dense'"),
        (1, 17, "multiples of 8, not 17 and 8; use 'dense'"),
    ],
)
def test_what_it_cannot_do_is_said(rng, queries, slots, message):
    mask = Mask(jnp.zeros((1, queries), int), jnp.zeros((1, slots), int))
    q, k = jnp.zeros((1, 2, queries, 8)), jnp.zeros((1, 2, slots, 8))
    with pytest.raises(NeoError, match=message):
        attend(q, k, k, mask, "single")
