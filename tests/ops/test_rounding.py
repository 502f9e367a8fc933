"""ops/rounding.py: float16 saturates, every other dtype is numpy's cast."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from neo_jax.ops.rounding import cast

FLOATS = arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32))


@hypothesis.given(FLOATS, st.sampled_from(["float32", "bfloat16", "float16"]))
def test_numbers_beyond_float16_become_its_largest(x, dtype):
    dtype = jnp.dtype(dtype)
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    if dtype == np.float16:
        expected = np.where(np.isinf(expected), np.copysign(np.float16(65504), x), expected)
    found = cast(jnp.asarray(x), dtype)
    assert found.dtype == dtype
    # As float32, for numpy has it that a NaN in bfloat16 is no other NaN.
    np.testing.assert_array_equal(*(np.asarray(each, np.float32) for each in (found, expected)))


def test_a_gradient_passes_where_a_number_fits():
    grad = jax.grad(lambda x: cast(x, jnp.float16).astype(jnp.float32).sum())
    np.testing.assert_array_equal(grad(jnp.array([1.0, 1e6, -1e6])), [1, 0, 0])
