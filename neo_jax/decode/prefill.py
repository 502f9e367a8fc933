"""Reading prompts into a cache: in one pass, or where that would be large, by pieces."""

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Int, Params
from neo_jax.model import cache as caching
from neo_jax.model.cache import Cache
from neo_jax.model.transformer import Neo

PIECE = 512  # tokens of each row that are read at one time
WHOLE = 8192  # tokens of all rows, padding included, that are still read in one pass


def read(
    model: Neo, params: Params, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], slots: int
) -> Cache:
    """Returns a cache that holds so many tokens of each row, of this capacity."""
    rows, longest = tokens.shape
    if longest <= PIECE or rows * longest <= WHOLE:
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
    config = model.config
    tokens = jnp.pad(tokens, ((0, 0), (0, -tokens.shape[1] % piece)))
    _, first = model.apply({"params": params}, tokens[:, :piece], method=Neo.hidden)
    # Until all is read, local layers keep what the first token of a piece sees, and the piece.
    known = jnp.minimum(lengths, piece)
    cache = caching.from_sequence(config, first, known, slots, slack=piece - 1)

    def read_piece(i: Array, cache: Cache) -> Cache:
        start = i * piece
        positions = start + jnp.arange(piece)[None]
        positions = jnp.where(positions < lengths[:, None], positions, -1)
        new = jax.lax.dynamic_slice_in_dim(tokens, start, piece, axis=1)
        return model.apply({"params": params}, new, positions, cache, method=Neo.hidden)[1]

    pieces = -(-jnp.max(lengths) // piece)
    cache = jax.lax.fori_loop(1, pieces, read_piece, cache)
    return caching.from_sequence(config, cache, lengths, slots, model.cache_dtype)
