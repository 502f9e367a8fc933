"""The FLOPs of a model by arithmetic: what training needs for a token, and attention for its pairs.

A multiplication and an addition are two. What programs do is counted by `neo_jax.tools.plan.flops`.
"""

from neo_jax.config import ModelConfig


def flops_per_token(config: ModelConfig, length: int, frozen: bool = False) -> float:
    """Returns the FLOPs that training needs for one token of a sequence of `length`.

    Six for each parameter that multiplies (Kaplan et al., 2020, section 2.1; the tied head once,
    what is only looked up never), or four where all are frozen and get no gradient; and 12 H N for
    each key that a query sees. Adapters are not counted.
    """
    is_table_used = config.tied_head and not config.head.is_classifier  # as the output head
    looked_up = config.max_length + (0 if is_table_used else config.vocab_size)
    weights = config.num_params - looked_up * config.embed_dim
    keys = visible_keys(config, length) / length
    return (4 if frozen else 6) * weights + 12 * config.embed_dim * keys


def visible_keys(config: ModelConfig, length: int) -> float:
    """Returns the pairs of a query and a key that it sees, in a sequence, over all layers."""
    pairs = 0.0
    for layer in range(config.num_layers):
        window = min(config.window(layer) or length, length)
        pairs += window * (window + 1) / 2 + (length - window) * window
    return pairs
