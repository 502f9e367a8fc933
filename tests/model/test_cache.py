"""model/cache.py: against a dictionary that remembers every token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.config import ModelConfig
from neo_jax.model import cache as caching
from neo_jax.model.cache import SLACK, LayerCache, extend, from_sequence, num_bytes, num_slots
from neo_jax.ops import cache_write
from neo_jax.ops.attention import Mask
from neo_jax.ops.int8 import rounded

CONFIG = ModelConfig(
    num_layers=2, embed_dim=4, num_heads=2, vocab_size=9, max_length=64, window_size=5
)
extend = jax.jit(extend)
at_once, in_turn = jax.jit(cache_write.write_at_once), jax.jit(cache_write.write_in_turn)
in_blocks = jax.jit(cache_write.write_in_blocks)


def contents(positions, heads=2, head_dim=3):
    """Keys or values [B, N, T, H] that name their row, head, position and dimension."""
    positions = np.asarray(positions, np.float32)[:, None, :, None]
    row = 1e5 * np.arange(positions.shape[0]).reshape(-1, 1, 1, 1)
    head = 1e4 * np.arange(heads).reshape(1, -1, 1, 1)
    dim = 1e3 * np.arange(head_dim).reshape(1, 1, 1, -1)
    return jnp.asarray(positions + row + head + dim, jnp.float32)


def append(cache, positions):
    new = contents(positions)
    return extend(cache, new, -new, jnp.asarray(positions, jnp.int32))


def empty(rows, slots):
    zeros = jnp.zeros((rows, 2, slots, 3))
    return LayerCache(zeros, zeros, jnp.full((rows, slots), -1, jnp.int32))


def assert_holds(cache, newest):
    """`newest` has a dictionary a row: slot to the position that it must hold."""
    positions = np.full(cache.positions.shape, -1)
    for row, slots in enumerate(newest):
        positions[row, list(slots)] = list(slots.values())
    np.testing.assert_array_equal(cache.positions, positions)
    held = (positions >= 0)[:, None, :, None]
    np.testing.assert_array_equal(jnp.where(held, cache.k, 0), contents(positions) * held)
    np.testing.assert_array_equal(jnp.where(held, cache.v, 0), -contents(positions) * held)


def remember(newest, positions, slots):
    for row, row_positions in zip(newest, positions, strict=True):
        row.update({int(p) % slots: int(p) for p in row_positions if p >= 0})


@st.composite
def histories(draw):
    """A window, and for each of two rows how many tokens every step appends."""
    window = draw(st.sampled_from([1, 5, 30]))
    width = draw(st.sampled_from([1, 4, SLACK + 1]))
    counts = st.lists(st.integers(0, width), min_size=2, max_size=2)
    return window, width, draw(st.lists(counts, min_size=1, max_size=25)), draw(st.booleans())


@given(histories())
@settings(max_examples=40)
def test_extend_keeps_the_newest_and_every_window_is_whole(history):
    window, width, steps, pad_left = history
    slots = window + SLACK
    cache, newest, lengths = empty(2, slots), [{}, {}], np.zeros(2, int)
    for counts in steps:
        chunk = np.full((2, width), -1)
        for row, count in enumerate(counts):
            place = slice(width - count, width) if pad_left else slice(0, count)
            chunk[row, place] = lengths[row] + np.arange(count)
        lengths += counts
        cache = append(cache, chunk)
        remember(newest, chunk, slots)
        seen = Mask(jnp.asarray(chunk), cache.positions, window).visible().sum(-1)
        np.testing.assert_array_equal(seen, np.where(chunk < 0, 0, np.minimum(chunk + 1, window)))
    assert_holds(cache, newest)


@given(histories())
@settings(max_examples=15)
def test_writing_in_turn_is_writing_at_once(history):
    """What TPUs do, and what others do."""
    window, width, steps, pad_left = history
    caches, lengths = [empty(2, window + SLACK)] * 2, np.zeros(2, int)
    for counts in steps[:5]:
        index = np.arange(width) - (width - np.array(counts)[:, None] if pad_left else 0)
        there = (index >= 0) & (index < np.array(counts)[:, None])
        chunk = np.where(there, lengths[:, None] + index, -1).astype(np.int32)
        lengths += counts
        caches = [
            write(cache, LayerCache(contents(chunk), -contents(chunk), jnp.asarray(chunk)))
            for write, cache in zip((at_once, in_turn), caches, strict=True)
        ]
    for ours, theirs in zip(*caches, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(
    slots=st.sampled_from([8, 20]),
    width=st.sampled_from([1, 5, 8]),
    rows=st.lists(st.tuples(st.integers(0, 45), st.integers(0, 8)), min_size=2, max_size=2),
)
@settings(max_examples=60)
def test_writing_in_blocks_is_writing_at_once(slots, width, rows):
    """What TPUs do with the tokens of a prompt, wherever the last slot is."""
    index = np.arange(width)
    chunk = np.stack([np.where(index < count, start + index, -1) for start, count in rows])
    chunk = chunk.astype(np.int32)
    held = np.arange(2 * slots, dtype=np.int32).reshape(2, slots) - 3
    cache = LayerCache(contents(held), -contents(held), jnp.asarray(held))
    new = LayerCache(contents(chunk), -contents(chunk), jnp.asarray(chunk))
    for ours, theirs in zip(in_blocks(cache, new), at_once(cache, new), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("position", [-1, 0, 7])
def test_writing_one_token_in_turn(position):
    chunk = jnp.full((1, 1), position)
    cache = LayerCache(*(x[:1] for x in empty(2, 5)))
    new = contents(chunk)
    for ours, theirs in zip(
        in_turn(cache, LayerCache(new, -new, chunk)),
        at_once(cache, LayerCache(new, -new, chunk)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_one_token_more_than_the_slack_would_cut_a_window():
    """The bound is sharp, so the test above can fail."""
    cache = empty(1, 5 + SLACK)
    for start, count in ((0, 10), (10, SLACK + 2)):
        chunk = start + np.arange(count)[None]
        cache = append(cache, chunk)
    seen = np.asarray(Mask(jnp.asarray(chunk), cache.positions, 5).visible().sum(-1))[0]
    assert seen[0] == 4
    assert (seen[1:] == 5).all()


@pytest.mark.parametrize("draft", [1, 8, SLACK])
def test_rolling_back_a_draft_leaves_the_window_whole(draft):
    """The step that a draft of `draft` tokens rides on appends one token more."""
    cache, newest = empty(1, 5 + SLACK), [{}]
    for start in range(40):
        cache = append(cache, np.array([[start]]))
        kept = cache.positions
        drafted = append(cache, start + np.arange(draft + 1)[None])
        kept = jnp.where(drafted.positions > start, -1, drafted.positions)
        cache = drafted._replace(positions=kept)
        seen = Mask(jnp.array([[start]]), cache.positions, 5).visible().sum()
        assert seen == min(start + 1, 5)
    remember(newest, [range(36, 40)], 5 + SLACK)
    assert set(newest[0].values()) <= set(np.asarray(cache.positions)[0].tolist())


@given(
    length=st.sampled_from([6, 21, 50]),
    width=st.sampled_from([6, 21, 50]),
    data=st.data(),
)
@settings(max_examples=30)
def test_from_sequence_equals_appending_one_by_one(length, width, data):
    """A global and a local layer, rows of any length, padding on the right."""
    width = min(length, width)
    lengths = data.draw(st.lists(st.integers(0, width), min_size=3, max_size=3))
    positions = np.broadcast_to(np.arange(width), (3, width))
    whole = LayerCache(contents(positions), -contents(positions), jnp.asarray(positions))
    caches = from_sequence(CONFIG, (whole, whole), jnp.asarray(lengths), length)
    assert [c.positions.shape[1] for c in caches] == [length, min(length, 5 + SLACK)]
    for cache in caches:
        slots, newest = cache.positions.shape[1], [{}, {}, {}]
        assert cache.k.shape == cache.v.shape == (3, 2, slots, 3)
        remember(newest, [range(n) for n in lengths], slots)
        assert_holds(cache, newest)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.int8])
@pytest.mark.parametrize(("length", "slack"), [(50, SLACK), (50, 31), (3, SLACK)])
def test_an_empty_cache_has_the_form_of_one_that_holds_prompts(dtype, length, slack):
    """And a step of decoding, which takes either, is one program."""

    def read():
        heads = jnp.zeros((3, CONFIG.num_heads, 7, CONFIG.head_dim), jnp.float16)
        whole = LayerCache(heads, heads, jnp.zeros((3, 7), jnp.int32))
        return from_sequence(CONFIG, (whole, whole), jnp.zeros(3, jnp.int32), length, dtype, slack)

    read = jax.eval_shape(read)
    none = jax.jit(lambda: caching.empty(CONFIG, 3, length, dtype, slack))()
    assert jax.tree.structure(none) == jax.tree.structure(read)
    for ours, theirs in zip(jax.tree.leaves(none), jax.tree.leaves(read), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert all((layer.positions == -1).all() for layer in none)


def test_a_cache_goes_on_where_a_sequence_ended():
    positions = np.broadcast_to(np.arange(30), (2, 30))
    whole = LayerCache(contents(positions), -contents(positions), jnp.asarray(positions))
    lengths, newest = np.array([30, 7]), [{}, {}]
    _, cache = from_sequence(CONFIG, (whole, whole), jnp.asarray(lengths), 50)
    remember(newest, [range(30), range(7)], 5 + SLACK)
    for step in range(4):
        chunk = lengths[:, None] + 4 * step + np.arange(4)
        cache = append(cache, chunk)
        remember(newest, chunk, 5 + SLACK)
    assert_holds(cache, newest)


def test_extend_keeps_the_dtype_of_the_cache():
    cache = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim == 4 else x, empty(1, 4))
    new = jnp.full((1, 2, 1, 3), 1 + 2**-12)
    cache = extend(cache, new, new, jnp.array([[2]]))
    assert cache.k.dtype == cache.v.dtype == jnp.bfloat16
    assert float(cache.k[0, 0, 2, 0]) == 1.0


def in_whole_numbers(cache):
    return cache._replace(k=rounded(cache.k, 1), v=rounded(cache.v, 1))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_cache_of_int8_holds_what_it_is_given_to_half_a_step(rng, rows):
    """A scale for each row, head and slot; one token, several, none."""
    floats = LayerCache(*(x[:rows] for x in empty(2, 5)))
    caches = [floats, in_whole_numbers(floats)]
    for chunk in ([[0]], [[1]], [[2, 3, 4]], [[-1]], [[5, -1, -1]]):
        positions = jnp.broadcast_to(jnp.asarray(chunk), (rows, len(chunk[0])))
        k, v = rng.normal(size=(2, rows, 2, positions.shape[1], 3)).astype(np.float32)
        twin = caches[1]
        caches = [extend(cache, k, v, positions) for cache in caches]
        new = in_whole_numbers(LayerCache(jnp.asarray(k), jnp.asarray(v), positions))
        for ours, theirs in zip(
            jax.tree.leaves(caches[1]), jax.tree.leaves(in_turn(twin, new)), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)
    for floats, int8 in zip(caches[0][:2], caches[1][:2], strict=True):
        assert (int8.values.dtype, int8.scale.shape) == (jnp.int8, (rows, 2, 5))
        np.testing.assert_allclose(int8.scale, np.abs(floats).max(axis=-1) / 127, rtol=1e-6)
        error = np.abs(np.asarray(int8.dequantized()) - floats)
        assert (error <= 0.5001 * np.asarray(int8.scale)[..., None]).all()
    np.testing.assert_array_equal(*(cache.positions for cache in caches))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_bytes_are_those_of_the_arrays(dtype):
    for layer, slots in enumerate((40, 5 + SLACK)):
        whole = LayerCache(*[jnp.zeros((1, 2, 9, 2))] * 2, jnp.zeros((1, 9), jnp.int32))
        cache = from_sequence(CONFIG, (whole, whole), jnp.array([9]), 40, dtype)[layer]
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        assert num_bytes(CONFIG, slots, dtype) == size


def test_num_slots():
    assert num_slots(CONFIG, 0, 64) == 64
    assert num_slots(CONFIG, 1, 64) == 5 + SLACK
    assert num_slots(CONFIG, 1, 5 + SLACK) == 5 + SLACK
    assert num_slots(CONFIG, 1, 20) == 20
    assert num_slots(CONFIG, 0, 20) == 20


@pytest.mark.parametrize("width", [1, 5, 20])
def test_shards_of_a_cache_are_written_as_the_whole_is(width):
    """Whatever a device's slots are, of tokens that wrap around and some that are none."""
    shards, size = 4, 6
    write = jax.jit(cache_write.write_shard, static_argnums=3)
    whole, parts = empty(2, shards * size), [empty(2, size)] * shards
    for start in (0, 3, 19, 40):
        chunk = start + np.arange(width)[None] + np.array([[0], [2]])
        chunk[1, : width // 2] = -1
        new = LayerCache(contents(chunk), -contents(chunk), jnp.asarray(chunk, jnp.int32))
        whole = at_once(whole, new)
        parts = [write(part, new, jnp.int32(i), shards) for i, part in enumerate(parts)]
    together = jax.tree.map(
        lambda *leaves: jnp.concatenate(leaves, min(leaves[0].ndim - 1, 2)), *parts
    )
    for ours, theirs in zip(together, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
