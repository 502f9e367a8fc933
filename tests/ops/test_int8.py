"""ops/int8.py and what layers.py makes of it: rounding, and products with whole numbers."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neo_jax.model.layers import Embed, einsum
from neo_jax.model.low_rank import LowRank
from neo_jax.ops import int8 as int8_product
from neo_jax.ops.int8 import Int8, rounded

SIZES = {"d": 96, "n": 4, "h": 24, "f": 160, "v": 70}
EQUATIONS = [  # every one that the model uses, with the number of inputs
    ("btd,nhd->btnh", 1),
    ("btnh,dnh->btd", 2),
    ("btd,fd->btf", 1),
    ("btf,df->btd", 1),
    ("btd,vd->btv", 1),
]
ROWS = (3, 5)


@pytest.fixture
def in_floats(monkeypatch):
    """What other devices than CPUs do, and CPUs do with more rows than `MOST_ROWS`."""
    monkeypatch.setattr(int8_product, "MOST_ROWS", 14)


def product(equation, x, weight, dtype):
    return jax.jit(functools.partial(einsum, equation, dtype=dtype))(x, weight)


def make(rng, equation, num_inputs, rows):
    """Returns x, an `Int8`, and the array that it stands for."""
    x_axes, weight_axes = equation.partition("->")[0].split(",")
    x = rng.normal(size=(*rows, *(SIZES[axis] for axis in x_axes[2:]))).astype(np.float32)
    x *= rng.exponential(size=(*rows, *[1] * (x.ndim - 2))).astype(np.float32)  # rows differ
    weight = rng.normal(size=[SIZES[axis] for axis in weight_axes]).astype(np.float32)
    int8 = rounded(jnp.asarray(weight), num_inputs)
    values = np.asarray(int8.values, np.float64)
    scale = np.asarray(int8.scale, np.float64)
    exact = values * scale.reshape(scale.shape + (1,) * num_inputs)
    return x, int8, exact


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 6)])
def test_rounding(rng, shape):
    weight = rng.normal(size=shape).astype(np.float32)
    weight[1] = 0
    int8 = rounded(jnp.asarray(weight), len(shape) - 1)
    assert (int8.values.dtype, int8.scale.dtype) == (jnp.int8, jnp.float32)
    assert (int8.values.shape, int8.scale.shape) == (shape, shape[:1])
    rows = weight.reshape(len(weight), -1)
    np.testing.assert_allclose(int8.scale, np.abs(rows).max(axis=1) / 127, rtol=1e-6)
    assert np.abs(np.asarray(int8.values, int)).reshape(len(rows), -1).max(axis=1).tolist() == [
        127 if row.any() else 0 for row in rows
    ]
    error = np.abs(np.asarray(int8.dequantized()) - weight).reshape(len(rows), -1)
    assert (error <= np.asarray(int8.scale)[:, None] * 0.5001).all()
    assert not np.asarray(int8.dequantized())[1].any()


@pytest.mark.parametrize(("equation", "num_inputs"), EQUATIONS)
@pytest.mark.usefixtures("in_floats")
def test_the_product_is_that_with_the_array(rng, equation, num_inputs):
    """In float32 to 1e-6 of the sum of magnitudes; whole numbers are exact in bfloat16."""
    x, int8, weight = make(rng, equation, num_inputs, ROWS)
    for dtype in (jnp.float32, jnp.bfloat16):
        y = np.asarray(product(equation, x, int8, dtype), np.float64)
        operand = x.astype(ml_dtypes.bfloat16) if dtype == jnp.bfloat16 else x
        operand = operand.astype(np.float64)
        error = np.abs(y - np.einsum(equation, operand, weight))
        assert (error <= 1e-6 * np.einsum(equation, abs(operand), abs(weight))).all()


@pytest.mark.parametrize(("equation", "num_inputs"), EQUATIONS)
def test_rows_on_a_cpu(rng, equation, num_inputs):
    """Activations are rounded too: half a fine step of each, 1 / 64516 of the row's largest."""
    x, int8, weight = make(rng, equation, num_inputs, ROWS)
    y = np.asarray(product(equation, x, int8, jnp.float32), np.float64)
    largest = np.abs(x).reshape(*ROWS, -1).max(axis=-1).reshape(*ROWS, *[1] * (x.ndim - 2))
    bound = np.einsum(equation, largest / 64516 + 1e-6 * np.abs(x), abs(weight))
    error = np.abs(y - np.einsum(equation, x.astype(np.float64), weight))
    assert (error <= bound).all()
    assert error.max() > 0.01 * bound.max()  # else another form was taken
    again = product(equation, x[:1, :1], int8, jnp.float32)
    np.testing.assert_array_equal(again[0, 0], y[0, 0].astype(np.float32))


def test_rows_without_activations_are_zeros(rng):
    x, int8, _ = make(rng, "btd,fd->btf", 1, ROWS)
    x[0, 1] = 0
    y = np.asarray(product("btd,fd->btf", x, int8, jnp.float32))
    assert not y[0, 1].any()
    assert np.isfinite(y).all()


@pytest.mark.usefixtures("in_floats")
def test_adapters_stand_beside_whole_numbers(rng):
    x, int8, weight = make(rng, "btd,fd->btf", 1, ROWS)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 96), (160, 3)))
    y = product("btd,fd->btf", x, LowRank(int8, jnp.asarray(a), jnp.asarray(b), 0.5), jnp.float32)
    np.testing.assert_allclose(y, x @ (weight + 0.5 * b @ a).T, rtol=0, atol=1e-3)


def test_rows_of_a_table_are_looked_up(rng):
    table = rng.normal(size=(70, 96)).astype(np.float32)
    int8 = rounded(jnp.asarray(table), 1)
    embed = Embed(70, 96, "vocab", jax.nn.initializers.zeros)
    ids = jnp.asarray([[3, 69, 0], [-1, 70, 5]])
    found = embed.apply({"params": {"embedding": int8}}, ids)
    expected = np.asarray(int8.dequantized())[np.clip(ids, 0, 69)]
    np.testing.assert_array_equal(found, expected)


def test_it_is_a_pytree():
    int8 = Int8(jnp.zeros((2, 3), jnp.int8), jnp.zeros(2))
    values, scale = jax.tree.leaves(int8)
    assert (values.shape, scale.shape) == ((2, 3), (2,))
