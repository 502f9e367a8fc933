"""What the blocks of attention form and read, against the mask itself."""

import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.ops.attention import Mask
from neo_jax.ops.attention.splash import block_size
from neo_jax.tools.plan.kernels import block_side, blocks


def formed(length, window, side):
    """The blocks that hold a visible logit."""
    index = jnp.arange(length)[None]
    seen = np.asarray(Mask(index, index, window).visible()[0])
    split = seen.reshape(length // side, side, length // side, side)
    return int(split.any(axis=(1, 3)).sum())


@pytest.mark.parametrize("largest", [256, 512, 1024])
@pytest.mark.parametrize("window", [None, 256, 300, 1, 257])
def test_blocks_are_those_that_hold_what_is_seen(window, largest):
    length = 2048
    side = block_size(length, window, largest)
    number = formed(length, window, side)
    found = blocks([window], length, largest)
    assert found.logits == number * side**2
    assert found.keys == number * side


def test_layers_are_averaged_and_lengths_filled():
    both = blocks([None, 256], 1000)
    alone = [blocks([window], 1024) for window in (None, 256)]
    assert both.logits == sum(each.logits for each in alone) / 2


def test_a_kernel_names_its_side():
    assert [block_side(name) for name in ("auto", "splash", "splash-1024")] == [0, 0, 1024]
