"""Checksums of arrays, wherever they are: they tell weights from others, and from damaged ones."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.axes import Array
from neo_jax.devices.processes import to_host


def checksums(tree: Any, dtype: str = "") -> dict[str, int]:
    """Returns a number of 32 bits for each array of a tree, by its path.

    It changes with every bit, and not with the places of an array's parts: sums of whole numbers
    are the same in any order. All processes that hold a part must call this.

    Args:
      tree: of arrays.
      dtype: which they are cast to before; empty is none.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = to_host(_checksums([leaf for _, leaf in leaves], dtype)).tolist()
    return {jax.tree_util.keystr(path): s for (path, _), s in zip(leaves, sums, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _checksums(leaves: list[Array], dtype: str) -> Array:
    return jnp.stack([_checksum(leaf.astype(dtype) if dtype else leaf) for leaf in leaves])


def _checksum(leaf: Array) -> Array:
    """The sum of a hash of each element's bits and place, modulo 2^32."""
    kind = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    mixed = jax.lax.bitcast_convert_type(leaf, kind).astype(jnp.uint32)
    stride = 1
    for axis in reversed(range(leaf.ndim)):
        places = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        mixed += places * jnp.uint32(stride * 2654435761 % 2**32)
        stride *= leaf.shape[axis]
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x45D9F3B)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
