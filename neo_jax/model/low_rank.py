"""A kernel and what was learned in addition to it: LoRA (Hu et al., 2021)."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float
from neo_jax.ops.int8 import Int8

Axes = tuple[str | None, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """The kernel x W + scale (x A) B: a pytree that stands where the kernel's array does.

    In a stacked tree all parts lead with the number of units; in trees of other things than arrays
    parts are such things. The weight comes first: it is the leaf whose shape Flax checks.
    """

    weight: Float[Array, "*weight"] | Int8  # [outputs..., inputs...]
    a: Float[Array, "rank *inputs"]
    b: Float[Array, "*outputs rank"]
    scale: float = dataclasses.field(metadata={"static": True})

    def merged(self) -> Float[Array, "*weight"]:
        """Returns the one array that does the same, weight + scale b a in float32."""
        assert not isinstance(self.weight, Int8)
        product = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
        for _ in range(self.a.ndim + self.b.ndim - 2 - self.weight.ndim):  # stacked
            product = jax.vmap(product)
        change = product(self.b.astype(jnp.float32), self.a.astype(jnp.float32))
        return self.weight.astype(jnp.float32) + self.scale * change


def low_rank_axes(axes: Sequence[str | None], num_inputs: int) -> tuple[Axes, Axes]:
    """Returns the logical axes of the a and the b of a `LowRank`, by those of its weight."""
    return (None, *axes[-num_inputs:]), (*axes[:-num_inputs], None)
