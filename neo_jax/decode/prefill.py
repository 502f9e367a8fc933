"""Reading prompts into a cache: in one pass, or where that would be large, by pieces."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import LENGTH, Array, Float, Int, Params
from neo_jax.decode.capacity import padded_length
from neo_jax.decode.prefixes import Path, PrefixCache, begin_with, put_piece, take_piece
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import pick

PIECE = 512  # tokens of each row that are read at one time
# Tokens of all rows, padding included, that are still read in one pass: for each of the devices
# that share a sequence.
WHOLE = 8192


def read(
    model: Neo, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], slots: int
) -> Cache:
    """Returns a cache that holds so many tokens of each row, of this capacity."""
    rows, longest = tokens.shape
    shards = model.sharding.num_shards(LENGTH) if model.sharding else 1
    if longest <= PIECE or rows * longest <= WHOLE * shards:
        return read_whole(model, params, tokens, lengths, slots)
    return read_in_pieces(model, params, tokens, lengths, slots, PIECE)


def read_whole(
    model: Neo, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], slots: int
) -> Cache:
    """`read` by the kernels for whole sequences; memory grows with B T."""
    # Prompts are padded on the right: padding is in the future, which nothing sees.
    _, sequence = model.apply({"params": params}, tokens, method=Neo.hidden)
    return caching.from_sequence(model.config, sequence, lengths, slots, model.cache_dtype)


def read_in_pieces(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    slots: int,
    piece: int,
) -> Cache:
    """`read` a piece after another, each on top of the cache.

    Memory next to the cache is that of one piece, whose logits against all keys are the most of it:
    8192 tokens take a tenth of what one pass takes. What is beyond the longest row is not read.
    """
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % piece)))
    _, cache = _first(model, params, tokens[:, :piece], lengths, slots)

    def read_piece(i: Array, cache: Cache) -> Cache:
        new = jax.lax.dynamic_slice_in_dim(tokens, i * piece, piece, axis=1)
        return _next(model, params, new, i * piece, lengths, cache)[1]

    pieces = -(-jnp.max(lengths) // piece)
    cache = jax.lax.fori_loop(1, pieces, read_piece, cache)
    return caching.from_sequence(model.config, cache, lengths, slots, model.cache_dtype)


def _first(
    model: Neo, params: Params, tokens: Int[Array, "B C"], lengths: Int[Array, "B"], slots: int
) -> tuple[Float[Array, "B C D"], Cache]:
    """Reads the first piece; returns its hidden states, and a cache for pieces of this size.

    Until all is read, local layers keep what the first token of a piece sees, and the piece.
    """
    piece = tokens.shape[1]
    hidden, sequence = model.apply({"params": params}, tokens, method=Neo.hidden)
    known = jnp.minimum(lengths, piece)
    slack = caching.slack_for(model.config, model.sharding, piece)
    return hidden, caching.from_sequence(model.config, sequence, known, slots, slack=slack)


def _next(
    model: Neo,
    params: Params,
    tokens: Int[Array, "B C"],
    start: Int[Array, ""],
    lengths: Int[Array, "B"],
    cache: Cache,
) -> tuple[Float[Array, "B C D"], Cache]:
    """Reads the piece that begins at a position; what lies beyond a row's length is dropped."""
    positions = start + jnp.arange(tokens.shape[1])[None]
    positions = jnp.where(positions < lengths[:, None], positions, -1)
    return model.apply({"params": params}, tokens, positions, cache, method=Neo.hidden)


first_chunk = jax.jit(_first, static_argnums=(0, 4))
next_chunk = jax.jit(_next, static_argnums=0, donate_argnums=5)


def piece_of(chunk: int) -> int:
    """Returns the tokens of a piece, a quarter of a chunk, by which prefixes are kept.

    What is left of a long prompt is read as one where it fits into that.
    """
    return max(chunk // 4, 1)


class Reading:
    """Prompts that are read together, a chunk at a time: others work between two of them.

    Prompts of no more than a chunk are read at once, at their padded length; longer ones on top of
    a cache of its own, as large as the context.
    """

    def __init__(
        self,
        model: Neo,
        params: Params,
        prompts: Sequence[Sequence[int]],
        rows: int,
        chunk: int,
        prefixes: PrefixCache | None = None,
    ):
        """Reads nothing yet.

        Args:
          model: the model.
          params: its parameters.
          prompts: ids, of one padded length if that is no longer than a chunk.
          rows: of the batch, no fewer than there are prompts.
          chunk: tokens of each prompt that are read at one time.
          prefixes: has what others began with, and gets what is read of a longer prompt.
        """
        self._model, self._params = model, params
        self._slots = padded_length(max(map(len, prompts)), model.config.max_length)
        if self._slots > chunk:
            self._slots = model.config.max_length
        self.chunk = min(chunk, self._slots)
        self.lengths = np.ones(rows, np.int32)
        self._piece = piece_of(self.chunk)
        self.tokens = np.zeros((rows, self._slots + -self._slots % self.chunk), np.int32)
        for row, ids in enumerate(prompts):
            self.tokens[row, : len(ids)], self.lengths[row] = ids, len(ids)
        self.start = 0  # tokens of each that have been read
        self.cache: Cache = ()
        self._prefixes = prefixes if self._slots > chunk else None
        self._path: Path = ()
        if self._prefixes:
            self._path = self._prefixes.path(prompts[0])
            for known in self._prefixes.find(prompts[0]):
                if self.start:
                    self.cache = put_piece(model, self.cache, known)
                else:
                    self.cache = begin_with(model, self._slots, chunk, known)
                self.start += self._prefixes.piece

    @property
    def is_done(self) -> bool:
        """Whether every prompt has been read."""
        return bool(self.start >= np.max(self.lengths))

    def advance(self) -> Float[Array, "B C D"]:
        """Reads the next chunk, C tokens; returns their hidden states."""
        model, params, start = self._model, self._params, self.start
        is_short = bool(start) and np.max(self.lengths) - start <= self._piece
        size = self._piece if is_short else self.chunk
        tokens = self.tokens[:, start : start + size]
        tokens = np.pad(tokens, ((0, 0), (0, size - tokens.shape[1])))
        if start:
            position = np.int32(start)
            hidden, self.cache = next_chunk(
                model, params, tokens, position, self.lengths, self.cache
            )
        else:
            hidden, self.cache = first_chunk(model, params, tokens, self.lengths, self._slots)
        self.start += size
        if self._prefixes:
            self._keep(self._prefixes, start)
        return hidden

    def _keep(self, prefixes: PrefixCache, start: int) -> None:
        """Gives the pieces that were read from a position on to those who begin alike."""
        size = prefixes.piece
        whole = min(self.start, size * len(self._path))
        for end in range(start + size, whole + 1, size):
            piece = take_piece(self._model, size, self.cache, np.int32(end - size))
            prefixes.add(self._path[: end // size], piece)


class Judged(NamedTuple):
    """How likely the model finds given tokens, and which it finds likeliest in their place."""

    logprobs: Float[Array, "B C"]
    ids: Int[Array, "B C K"]  # likeliest first
    likeliest: Float[Array, "B C K"]  # and their log p


@functools.partial(jax.jit, static_argnums=(0, 1))
def judge(
    model: Neo,
    count: int,
    params: Params,
    hidden: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
) -> Judged:
    """Says of the token that follows each hidden state how likely it is, next to `count` others."""
    logits = model.apply({"params": params}, hidden, method=Neo.unembed)
    logprobs = jax.nn.log_softmax(logits)
    likeliest, ids = jax.lax.top_k(logprobs, count)
    return Judged(pick(logprobs, targets), ids, likeliest)
