"""Beginnings of prompts that have been read before: a tree of pieces, and their keys and values.

A node is a piece of some tokens behind those of its parents. It holds the keys and values of its
own tokens in every layer, a local layer's too: with what its parents hold these are all that a
later token sees. A prompt that begins as another did has its pieces written into a cache, bit by
bit as they were computed, and is read from there on.
"""

import functools
from collections import OrderedDict
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Int
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.transformer import Neo
from neo_jax.ops.cache_write import slot_axis, write_slots

Path = tuple[tuple[int, ...], ...]
"""Pieces of tokens, from the first one on: the name of a node."""


class PrefixCache:
    """Keys and values of pieces, the least recently used of which make room for others."""

    def __init__(self, piece: int, most_bytes: int):
        """Holds nothing yet; `piece` is the tokens of a node, `most_bytes` the size of all."""
        self.piece, self.most_bytes = piece, most_bytes
        self._nodes: OrderedDict[Path, Cache] = OrderedDict()  # parents were used after children
        self.num_bytes = 0
        self.queried = self.hit = 0  # tokens of prompts that were looked up, and found

    def path(self, ids: Sequence[int]) -> Path:
        """Returns the whole pieces of a prompt, but for its last token, which must be read."""
        ends = range(self.piece, len(ids), self.piece)
        return tuple(tuple(ids[end - self.piece : end]) for end in ends)

    def find(self, ids: Sequence[int]) -> list[Cache]:
        """Returns the keys and values of the first pieces of a prompt, as far as they are known."""
        path = self.path(ids)
        self.queried += len(ids)
        known = [path[:end] for end in range(1, len(path) + 1) if path[:end] in self._nodes]
        for name in reversed(known):
            self._nodes.move_to_end(name)
        self.hit += self.piece * len(known)
        return [self._nodes[name] for name in known]

    def add(self, path: Path, piece: Cache) -> None:
        """Keeps the last piece of a path, if its parents are kept and there is room."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(piece))
        parents = [path[:end] for end in range(1, len(path))]
        if path in self._nodes or any(name not in self._nodes for name in parents):
            return
        self._nodes[path] = piece
        self.num_bytes += size
        for name in reversed(parents):
            self._nodes.move_to_end(name)
        while self.num_bytes > self.most_bytes:
            _, dropped = self._nodes.popitem(last=False)
            self.num_bytes -= sum(leaf.nbytes for leaf in jax.tree.leaves(dropped))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin_with(model: Neo, slots: int, chunk: int, piece: Cache) -> Cache:
    """Returns a cache for `slots` tokens, read by chunks, that holds a row's first piece."""
    lengths = jnp.full(1, piece[0].positions.shape[1], jnp.int32)
    slack = caching.slack_for(model.config, model.sharding, chunk)
    made = caching.from_sequence(model.config, piece, lengths, slots, slack=slack)
    return tuple(caching.place(model.sharding, layer) for layer in made)


@functools.partial(jax.jit, static_argnums=(0, 1))
def take_piece(model: Neo, size: int, cache: Cache, start: Int[Array, ""]) -> Cache:
    """Returns the keys and values of so many tokens of one row from a position on."""

    def take(leaf: Array) -> Array:
        axis = slot_axis(leaf.ndim)
        places = (start + jnp.arange(size)) % leaf.shape[axis]
        return jnp.take(leaf, places, axis=axis)

    return tuple(caching.place(model.sharding, layer) for layer in jax.tree.map(take, cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def put_piece(model: Neo, cache: Cache, piece: Cache) -> Cache:
    """Writes the keys and values of a piece of one row into the slots of its positions."""
    made = [write_slots(old, new) for old, new in zip(cache, piece, strict=True)]
    return tuple(caching.place(model.sharding, layer) for layer in made)
