"""What tests of decoding share."""

import jax
import pytest
from decode_model import MODEL

from neo_jax.model.transformer import init_params


@pytest.fixture(scope="module")
def params():
    """Parameters of MODEL, drawn so large that its texts depend on what they follow."""
    drawn = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(2))
    scales = {"kernel": 2, "wpe": 8}
    return jax.tree.map_with_path(
        lambda path, leaf: scales.get(path[0].key, scales.get(path[-1].key, 1)) * leaf, drawn
    )
