"""Attention where a strategy splits sequences: what devices exchange of keys, values and queries.

Of C devices that share a sequence each has the queries, keys and values of n = T / C tokens. In a
local layer a query sees its window, so a device needs no more than the W - 1 keys and values before
its own, a halo, whatever T is: its neighbour sends them, and where n < W - 1 those behind it the
rest. In a global layer each device gathers the keys and values of all.

There the first device would have little to do, its queries see so few keys, and the last one much.
So a kernel that skips what nobody sees gets queries of two places: device i and device C - 1 - i
exchange the second half of their queries, and of the results. Every device then has the same work:
of 2C parts of the sequence it has parts 2i and 2C - 1 - 2i. That moves 1 / (2C - 2) of what
gathering keys and values does, and leaves everything but the queries of global layers in order.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from neo_jax.axes import BATCH, HEAD_DIM, HEADS, LENGTH, Array, Float
from neo_jax.ops.attention.mask import Mask
from neo_jax.ops.attention.splash import causal_kernel
from neo_jax.sharding.fsdp import torus_axes
from neo_jax.sharding.rules import Sharding

Names = tuple[str, ...]


def context_axes(sharding: Sharding | None) -> Names:
    """Returns the mesh axes that split a sequence in attention: those of the rule for `length`.

    What splits heads too splits sequences between blocks only: in attention each device has all
    tokens of its heads.
    """
    if sharding is None:
        return ()
    taken = sharding.mesh_axes(HEADS) + sharding.mesh_axes(HEAD_DIM)
    return tuple(name for name in sharding.mesh_axes(LENGTH) if name not in taken)


def attend_split(
    kernel: Callable[..., Array],
    skips: bool,
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N T H"],
    v: Float[Array, "B N T H"],
    mask: Mask,
    sharding: Sharding,
) -> Float[Array, "B N T H"]:
    """Returns attention of a sequence to itself, where `context_axes` split it.

    Args:
      kernel: computes what a device has, by the signature of `attend`.
      skips: whether it is `splash`, which computes no block that nobody sees.
      q: queries.
      k: keys.
      v: values.
      mask: aligned.
      sharding: the strategy.
    """
    names = context_axes(sharding)
    mesh, cut = torus_axes(sharding, names)
    parts = sum((cut[name] for name in names), ())
    kept = tuple((axis, sharding.mesh_axes(axis)) for axis in (BATCH, HEADS))
    sharding = Sharding(mesh, (*kept, (LENGTH, parts)))
    split = _Split(mesh, parts, q.shape[2] // sharding.num_shards(LENGTH))
    heads = sharding.spec((BATCH, HEADS, LENGTH, None), q.shape, "queries")
    rows = sharding.spec((BATCH, None), mask.q_positions.shape, "positions")
    prepared, of_prepared = None, sharding.spec((), ())
    if mask.window is not None:
        function = functools.partial(_local, split, kernel)
    elif skips:
        num_heads = q.shape[1] // sharding.num_shards(HEADS)
        prepared = causal_kernel(split.dealt(), q.shape[2], num_heads)
        place = sharding.named((None, LENGTH), (1, split.num_shards))
        of_prepared = prepared.manual_sharding_spec(place)
        function = functools.partial(_balanced, split, kernel)
    else:
        function = functools.partial(_gathered, split, kernel)
    on_each_device = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(of_prepared, heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,  # Pallas kernels do not declare along which axes they vary
    )
    return on_each_device(prepared, q, k, v, mask)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How a sequence is split; its methods but `dealt` are for one device, within `shard_map`."""

    mesh: Mesh | AbstractMesh
    names: Names  # mesh axes, each along one axis of the torus
    size: int  # tokens of a shard

    @property
    def num_shards(self) -> int:
        """How many devices share the sequence."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def sent(self, x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
        """Sends an array from shards to others; who gets nothing has zeros."""
        names = tuple(name for name in self.mesh.axis_names if name in self.names)
        places = np.arange(self.num_shards).reshape([self.mesh.shape[name] for name in names])
        number = places.transpose([names.index(name) for name in self.names]).reshape(-1).tolist()
        return jax.lax.ppermute(x, names, [(number[i], number[j]) for i, j in pairs])

    def halo(self, x: Array, rows: int) -> Array:
        """Returns [B, N, n, H] behind the rows of the shards before it; zeros where none are."""
        parts, away = [x], 1
        while rows > 0:
            taken = min(rows, self.size)
            pairs = [(i, i + away) for i in range(self.num_shards - away)]
            last = x[:, :, self.size - taken :]
            parts.insert(0, self.sent(last, pairs))
            rows, away = rows - taken, away + 1
        return jnp.concatenate(parts, axis=2)

    def whole(self, x: Array) -> Array:
        """Returns the rows of all shards, [B, N, T, H]."""
        return _gather(self.names, x)

    def exchanged(self, x: Array) -> Array:
        """Exchanges the second half of [B, N, n, H] with the shard as far from the other end."""
        half = self.size // 2
        pairs = [(i, self.num_shards - 1 - i) for i in range(self.num_shards)]
        return jnp.concatenate([x[:, :, :half], self.sent(x[:, :, half:], pairs)], axis=2)

    def here(self, x: Array, before: int = 0) -> Array:
        """Returns this shard's entries of [B, T], and those before it; -1 where there are none."""
        padded = jnp.pad(x, ((0, 0), (before, 0)), constant_values=-1)
        start = jax.lax.axis_index(self.names) * self.size
        return jax.lax.dynamic_slice_in_dim(padded, start, before + self.size, axis=1)

    def here_exchanged(self, x: Array) -> Array:
        """Returns the entries of [B, T] of the queries that `exchanged` gives this shard."""
        index, half = jax.lax.axis_index(self.names), self.size // 2
        take = functools.partial(jax.lax.dynamic_slice_in_dim, x, axis=1)
        mirrored = (self.num_shards - 1 - index) * self.size + half
        return jnp.concatenate([take(index * self.size, half), take(mirrored, self.size - half)], 1)

    def dealt(self) -> np.ndarray:
        """Returns the index of every query, [shards, n], where `exchanged` puts it."""
        index = np.arange(self.num_shards * self.size).reshape(self.num_shards, self.size)
        half = self.size // 2
        return np.concatenate([index[:, :half], index[::-1, half:]], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(names: Names, x: Array) -> Array:
    for name in reversed(names):  # in turn, see `along_torus`
        x = jax.lax.all_gather(x, name, axis=2, tiled=True)
    return x


def _scatter(names: Names, _: None, grad: Array) -> tuple[Array]:
    # Tokens are the rows of a matrix: of other forms TPUs give the whole sum to all.
    batch, heads, length, size = grad.shape
    rows = grad.transpose(2, 0, 1, 3).reshape(length, -1)
    for name in names:
        rows = jax.lax.psum_scatter(rows, name, scatter_dimension=0, tiled=True)
    return (rows.reshape(-1, batch, heads, size).transpose(1, 2, 0, 3),)


_gather.defvjp(lambda names, x: (_gather(names, x), None), _scatter)


def _local(
    split: _Split, kernel: Callable[..., Array], _: None, q: Array, k: Array, v: Array, mask: Mask
) -> Array:
    """Attention to a window, on a device."""
    assert mask.window is not None
    rows = min(mask.window - 1, (split.num_shards - 1) * split.size)
    starts = mask.segment_starts
    # Of the first shards the kernel has to know that before them there is nothing.
    starts = jnp.zeros_like(mask.q_positions) if starts is None else starts
    of_device = Mask(
        split.here(mask.q_positions),
        split.here(mask.k_positions, rows),
        mask.window,
        aligned=True,
        segment_starts=split.here(starts),
        k_segment_starts=split.here(starts, rows),
    )
    return kernel(q, split.halo(k, rows), split.halo(v, rows), of_device)


def _gathered(
    split: _Split, kernel: Callable[..., Array], _: None, q: Array, k: Array, v: Array, mask: Mask
) -> Array:
    """Attention to all keys, on a device; the kernel computes those that it hides too."""
    starts = None if mask.segment_starts is None else split.here(mask.segment_starts)
    of_device = Mask(split.here(mask.q_positions), mask.k_positions, segment_starts=starts)
    return kernel(q, split.whole(k), split.whole(v), of_device)


def _balanced(
    split: _Split, kernel: Callable[..., Array], prepared: Any,
    q: Array, k: Array, v: Array, mask: Mask,
) -> Array:  # fmt: skip
    """Attention to all keys, on a device, with the same work on each."""
    starts = mask.segment_starts
    of_device = Mask(
        split.here_exchanged(mask.q_positions),
        mask.k_positions,
        segment_starts=None if starts is None else split.here_exchanged(starts),
        k_segment_starts=starts,
    )
    y = kernel(split.exchanged(q), split.whole(k), split.whole(v), of_device, prepared)
    return split.exchanged(y.astype(q.dtype)).astype(y.dtype)
