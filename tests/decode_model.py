"""A model that the tests of decoding share: two layers, a window of 16, texts that never end."""

import jax

from neo_jax.config import ModelConfig
from neo_jax.model.transformer import Neo, init_params

CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    vocab_size=128,
    max_length=160,
    window_size=16,
    eos_token_id=-1,
)
MODEL = Neo(CONFIG)


def draw_params(model, seed):
    """Parameters drawn so large that texts depend on what they follow, and do not repeat."""
    drawn = jax.jit(lambda key: init_params(model, key))(jax.random.key(seed))
    scales = {"kernel": 2, "wpe": 8}
    return jax.tree.map_with_path(
        lambda path, leaf: scales.get(path[0].key, scales.get(path[-1].key, 1)) * leaf, drawn
    )
