"""decode/prefill.py: prompts read by pieces, and at once."""

import functools

import jax
import numpy as np
import pytest
from decode_model import CONFIG, MODEL

from neo_jax.decode import engine, prefill
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding

LENGTHS = [0, 1, 23, 24, 25, 72, 100, 130]


@pytest.fixture(scope="module")
def params():
    return jax.jit(functools.partial(init_params, MODEL))(jax.random.key(0))


@pytest.mark.parametrize("piece", [24, 100])  # more and less than a local layer keeps
def test_pieces_leave_the_cache_that_one_pass_leaves(params, piece):
    tokens = np.random.default_rng(0).integers(1, 128, (len(LENGTHS), 130)).astype(np.int32)
    lengths = np.array(LENGTHS, np.int32)
    whole = jax.jit(prefill.read_whole, static_argnums=(0, 4))(MODEL, params, tokens, lengths, 160)
    pieces = jax.jit(prefill.read_in_pieces, static_argnums=(0, 4, 5))(
        MODEL, params, tokens, lengths, 160, piece
    )
    for ours, expected in zip(pieces, whole, strict=True):
        np.testing.assert_array_equal(ours.positions, expected.positions)
        holds = (np.asarray(expected.positions) >= 0)[:, None, :, None]
        for mine, theirs in ((ours.k, expected.k), (ours.v, expected.v)):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine * holds, theirs * holds, rtol=0, atol=1e-5)
    assert sorted(int((np.asarray(layer.positions) >= 0).sum(1).max()) for layer in whole) == [
        32,  # a local layer's slots
        130,
    ]


@pytest.mark.parametrize("piece", [24, 33])
def test_pieces_on_a_mesh_that_splits_rows_heads_and_slots(params, piece):
    """A local layer needs 39 slots, which do not divide over two devices, or 48."""
    tokens = np.random.default_rng(1).integers(1, 128, (4, 99)).astype(np.int32)
    lengths = np.array([99, 1, 40, 72], np.int32)
    read = jax.jit(prefill.read_in_pieces, static_argnums=(0, 4, 5))
    model = Neo(CONFIG, sharding=make_sharding("data=2,context=2,model=2", "decode"))
    expected = read(MODEL, params, tokens, lengths, 160, piece)
    for ours, theirs in zip(
        read(model, params, tokens, lengths, 160, piece), expected, strict=True
    ):
        np.testing.assert_array_equal(ours.positions, theirs.positions)
        holds = (np.asarray(theirs.positions) >= 0)[:, None, :, None]
        for mine, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
            np.testing.assert_allclose(mine * holds, other * holds, rtol=0, atol=1e-5)


def test_long_prompts_are_read_by_pieces(params, monkeypatch):
    """And texts go on from there as they do from one pass."""
    prompts = [list(range(1, length + 1)) for length in (100, 3)]
    settings = make_settings(SamplingOptions(temperature=0.0), [0, 0])
    expected = engine.generate(MODEL, params, prompts, 6, settings)
    pieces = []
    read_in_pieces = prefill.read_in_pieces

    def noting(*args):
        pieces.append(args[-1])
        return read_in_pieces(*args)

    monkeypatch.setattr(prefill, "read_in_pieces", noting)
    monkeypatch.setattr(prefill, "PIECE", 32)
    other = Neo(CONFIG, kernel="blocked")  # to JAX another model, whose programs are its own
    assert engine.generate(other, params, prompts[1:] * 2, 6, settings)[0].ids == expected[1].ids
    assert pieces == []  # neither long
    monkeypatch.setattr(prefill, "WHOLE", 255)
    found = engine.generate(other, params, prompts, 6, settings)
    assert pieces == [32]
    assert [text.ids for text in found] == [text.ids for text in expected]
