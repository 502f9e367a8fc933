"""What the compiled decoding loop does to the cache."""

import re

import jax
import pytest

from neo_jax.decode import engine
from neo_jax.decode.sampling import SamplingOptions, make_settings


@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_copies_a_cache(tiny, batch):
    model, params = tiny
    settings = make_settings(SamplingOptions(), [0] * batch)
    state = engine.start(model, params, [[1, 2, 3]] * batch, 40, settings)
    program = engine.run.lower(model, params, state, 1).compile().as_text()
    copied = re.findall(r"= (\S+?)\{\S* copy\(", program)
    sizes = {"x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.cache)}
    sizes |= {size.partition("x")[2] for size in sizes}  # without the batch axis
    assert len(sizes) == 8  # keys or values, and positions, of a global and of a local layer
    large = {size for size in sizes if size.count("x") >= 2}
    assert not large & {re.sub(r"^\w+\[|\]$", "", shape).replace(",", "x") for shape in copied}
