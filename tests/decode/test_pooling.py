"""Weights of tokens in the one vector of a text."""

import numpy as np
import pytest

from neo_jax.decode.pooling import pool_weights
from neo_jax.errors import NeoError


def test_weights_sum_to_one():
    np.testing.assert_allclose(pool_weights("mean", 4), [0.25] * 4)
    np.testing.assert_allclose(pool_weights("last", 3), [0, 0, 1])
    np.testing.assert_allclose(pool_weights("weighted", 3), [1 / 6, 2 / 6, 3 / 6])
    with pytest.raises(NeoError, match="no pooling is called 'mena'"):
        pool_weights("mena", 3)
