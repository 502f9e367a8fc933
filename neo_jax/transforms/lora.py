"""LoRA (Hu et al., 2021): what is trained is a product of low rank next to each of some kernels.

Adapters are a tree of their own, the parameter tree cut down to these kernels, with {"a": ...,
"b": ...} in the place of each. `add_adapters` puts them where they belong, for any form of the
model; `merge` makes one array of each kernel and its adapter.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from neo_jax.axes import LAYERS, Array, Params
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.fields import check, number
from neo_jax.model.low_rank import LowRank, low_rank_axes
from neo_jax.model.tensor_table import KERNELS, tensors


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels get adapters, in the terms of PEFT.

    Raises:
      NeoError: a negative rank, an alpha that is not finite, or a target that is no kernel.
    """

    # Of the adapters; 0 trains all weights instead.
    rank: int = number(0, least=0, words="be 0 (off) or more, not {}")
    # Adapters are added alpha / rank times.
    alpha: float = number(16.0, above=-math.inf, below=math.inf, words="be finite, not {}")
    # of q_proj, k_proj, v_proj, out_proj, c_fc and c_proj
    targets: tuple[str, ...] = ("q_proj", "v_proj")

    def __post_init__(self) -> None:
        check(self, "lora.")
        if not self.targets:
            raise NeoError(f"lora.targets is empty; name some of {', '.join(KERNELS)}.")
        for name in self.targets:
            if name not in KERNELS:
                raise NeoError(
                    f"lora.targets: no kernel is called '{name}'; choose from {', '.join(KERNELS)}."
                )

    @property
    def scale(self) -> float:
        """How many times adapters are added."""
        return self.alpha / self.rank


def init_adapters(config: ModelConfig, lora: LoraConfig, key: Array) -> Params:
    """Draws stacked adapters, float32, as PEFT does; pure, may be jitted.

    The entries of a are uniform within 1 / sqrt(inputs), those of b zeros: at first they change
    nothing.
    """
    unit = len(config.attention_types)
    leaves = {}
    for row in tensors(config):
        layer, name = row.path[0], row.path[-2]
        position = int(layer.removeprefix("h_")) if layer.startswith("h_") else unit
        if position >= unit or not row.num_inputs or name not in lora.targets:
            continue
        outputs, inputs = row.shape[: -row.num_inputs], row.shape[-row.num_inputs :]
        path = (f"unit_{position}", *row.path[1:])
        lead, bound = config.num_layers // unit, math.prod(inputs) ** -0.5
        key, here = jax.random.split(key)
        leaves[*path, "a"] = jax.random.uniform(
            here, (lead, lora.rank, *inputs), minval=-bound, maxval=bound
        )
        leaves[*path, "b"] = jnp.zeros((lead, *outputs, lora.rank))
    return unflatten_dict(leaves)


def add_adapters(params: Params, adapters: Params, scale: float) -> Params:
    """Returns parameters with a `LowRank` in the place of each kernel that has an adapter.

    Both are canonical, or both stacked; adapters are added `scale` times, alpha / rank.
    """
    added = dict(params)
    for name, tree in adapters.items():
        here = params[name]
        added[name] = (
            add_adapters(here, tree, scale)
            if isinstance(here, dict)
            else LowRank(here, **tree, scale=scale)
        )
    return added


def with_norms(kernel: Array, norms: Array) -> Array:
    """Returns a kernel whose every output has the norm that it is given (DoRA; Liu et al., 2024).

    Args:
      kernel: float32 [outputs..., inputs...].
      norms: float32 [outputs...]; an output of zeros stays as it is.
    """
    inputs = tuple(range(norms.ndim, kernel.ndim))
    found = jnp.sqrt(jnp.sum(kernel * kernel, inputs))
    factor = norms / jnp.where(found == 0, 1, found)
    return kernel * jnp.expand_dims(factor, inputs)


def merge(params: Params) -> Params:
    """Returns parameters with a float32 array in the place of each `LowRank`."""
    return jax.tree.map(
        lambda leaf: leaf.merged() if isinstance(leaf, LowRank) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, LowRank),
    )


def adapter_axes(adapters: Params, axes: Any) -> Params:
    """Returns stacked adapters with each leaf's tuple of logical axes in its place.

    `axes` are those of the stacked parameters, see `scan.stacked_axes`; where a tree has no
    adapters, as one of all parameters, they are the result.
    """
    if not isinstance(adapters, dict):
        return axes
    if isinstance(axes, dict):
        return {name: adapter_axes(tree, axes[name]) for name, tree in adapters.items()}
    a, b = low_rank_axes(axes[1:], adapters["a"].ndim - 2)
    return {"a": (LAYERS, *a), "b": (LAYERS, *b)}
