"""model/flops.py: what training needs for a token, by hand and counted one by one."""

import dataclasses
import math

import pytest

from neo_jax.config import ModelConfig, preset
from neo_jax.model.flops import flops_per_token
from neo_jax.model.tensor_table import tensors

TINY = ModelConfig(
    num_layers=4, embed_dim=32, num_heads=2, vocab_size=96, max_length=64, window_size=8
)


def counted(config, length):
    """Multiplications and additions of a forward pass, counted one by one, three times over.

    The backward pass multiplies twice where the forward pass does once.
    """
    weights = sum(math.prod(row.stored_shape) for row in tensors(config) if row.path[0] != "wpe")
    seen = 0
    for kind in config.layer_types:
        window = config.window_size if kind == "local" else length
        seen += sum(query - key < window for query in range(length) for key in range(query + 1))
    heads = config.num_heads * config.head_dim
    per_pair = 2 * heads + 2 * heads  # a logit, and a value's share of the output
    return 3 * (2 * weights * length + per_pair * seen) / length


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 64])
@pytest.mark.parametrize(
    "attention_types", [("global", "local"), ("global",), ("local",), ("global", "local", "local",
                                                                       "local")]
)  # fmt: skip
def test_flops_are_what_a_count_gives(length, attention_types):
    config = dataclasses.replace(TINY, attention_types=attention_types)
    assert flops_per_token(config, length) == pytest.approx(counted(config, length), rel=1e-12)
    weights = sum(math.prod(row.stored_shape) for row in tensors(config) if row.path[0] != "wpe")
    saved = flops_per_token(config, length) - flops_per_token(config, length, frozen=True)
    assert saved == pytest.approx(2 * weights)  # those of the gradients


def test_flops_of_the_smallest_published_model():
    """Six a parameter and a half more for attention at the full context, by hand."""
    config = preset("gpt-neo-125m")
    keys = 6 * 2049 / 2 + 6 * (256 * 257 / 2 + 1792 * 256) / 2048
    expected = 6 * (125_198_592 - 2048 * 768) + 12 * 768 * keys
    assert flops_per_token(config, 2048) == pytest.approx(expected, rel=1e-12)
