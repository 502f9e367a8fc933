"""How parameters are drawn: as Mesh-TensorFlow drew GPT-Neo's, or as GPT-2's were."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.nn.initializers import Initializer

from neo_jax.axes import Array
from neo_jax.config import ModelConfig
from neo_jax.families import GPT_NEO


def stddev(config: ModelConfig, name: str) -> float:
    """Returns the standard deviation with which a kernel is drawn."""
    # Logits that are not scaled need GPT-Neo's.
    scales = (config.family if config.scale_attention else GPT_NEO).scales
    return scales.get(name, scales[""])(config)


def zeros_beyond(rows: int, init: Initializer) -> Initializer:
    """Returns an initializer whose rows from `rows` on are zeros; they also stay zeros."""

    def padded(key: Array, shape: Sequence[int], *args: Any, **kwargs: Any) -> Array:
        exists = jnp.arange(shape[0])[:, None] < rows
        return jnp.where(exists, init(key, shape, *args, **kwargs), 0)

    return padded
