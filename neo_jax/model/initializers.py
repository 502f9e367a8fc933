"""How parameters are drawn: as Mesh-TensorFlow drew GPT-Neo's, or as GPT-2's were."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.nn.initializers import Initializer

from neo_jax.axes import Array
from neo_jax.config import ModelConfig


def stddev(config: ModelConfig, name: str) -> float:
    """Returns the standard deviation with which a kernel is drawn."""
    if config.scale_attention:  # Radford et al., "Language models are unsupervised ...", 2.3
        ends_branch = name in ("out_proj", "c_proj")
        return 0.02 * (2 * config.num_layers) ** -0.5 if ends_branch else 0.02
    # Mesh-TensorFlow's keeps the unscaled logits near unit variance.
    return {
        "q_proj": (config.embed_dim * config.head_dim) ** -0.5,
        "c_fc": 0.02,
        "c_proj": 0.02 * config.num_layers**-0.5,
    }.get(name, config.embed_dim**-0.5)


def zeros_beyond(rows: int, init: Initializer) -> Initializer:
    """Returns an initializer whose rows from `rows` on are zeros; they also stay zeros."""

    def padded(key: Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> Array:
        exists = jnp.arange(shape[0])[:, None] < rows
        return jnp.where(exists, init(key, shape, *args, **kwargs), 0)

    return padded
