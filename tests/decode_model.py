"""A model that the tests of decoding share: two layers, a window of 16, texts that never end."""

from neo_jax.config import ModelConfig
from neo_jax.model.transformer import Neo

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
