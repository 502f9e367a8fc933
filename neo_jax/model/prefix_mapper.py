"""From features, such as those of an image, to embeddings that a text follows.

A linear map (Merullo et al., "Linearly mapping from image to text space", 2023), or one with a
hidden layer of tanh (Mokady et al., "ClipCap", 2021, section 3.2). Every device has all of it.
"""

import math

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float, Params
from neo_jax.model.layers import einsum

MAPPER = "prefix_mapper"
"""The name of its parameters among the model's."""


def init_mapper(key: Array, features: int, tokens: int, width: int, hidden: int = 0) -> Params:
    """Draws a mapper, float32: kernels scaled by 1 / sqrt(inputs), and zero biases.

    Of features of size 1 the embeddings are about 0.1, as those of words are.

    Args:
      key: of the draw.
      features: how many numbers it takes.
      tokens: how many embeddings it makes of them.
      width: of each.
      hidden: units of a hidden layer; 0 has none.
    """

    def layer(number: int, scale: float, inputs: int, *outputs: int) -> Params:
        drawn = jax.random.normal(jax.random.fold_in(key, number), (*outputs, inputs))
        return {"kernel": drawn * scale / math.sqrt(inputs), "bias": jnp.zeros(outputs)}

    first = {"hidden": layer(0, 1.0, features, hidden)} if hidden else {}
    return first | {"out": layer(1, 0.1, hidden or features, tokens, width)}


def map_features(mapper: Params, features: Float[Array, "B I"]) -> Float[Array, "B K D"]:
    """Returns the embeddings of each row of features, float32."""
    x = features[:, None]
    if "hidden" in mapper:
        x = einsum("bti,hi->bth", x, mapper["hidden"]["kernel"], jnp.float32)
        x = jnp.tanh(x + mapper["hidden"]["bias"][None, None])
    x = einsum("bti,kdi->btkd", x, mapper["out"]["kernel"], jnp.float32)
    return x[:, 0] + mapper["out"]["bias"][None]
