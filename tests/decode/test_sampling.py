"""decode/sampling.py: how tokens are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from decode_warpers import EOS, LENGTH, warped
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.decode import sampling
from neo_jax.decode.options import SamplingOptions, make_settings, stack_settings
from neo_jax.decode.processors import History

pytestmark = pytest.mark.optimized

VOCAB = 32
NUM_DRAWS = 100_000

choose_after = jax.jit(lambda *args: sampling.choose(*args, (EOS,)))


def texts_of(lengths):
    """Histories that only count: no setting looks at their tokens."""
    lengths = jnp.asarray(lengths, jnp.int32)
    return History(jnp.zeros((len(lengths), 1), jnp.int32), lengths, lengths, lengths + LENGTH)


def choose(logits, settings, positions):
    return choose_after(logits, settings, texts_of(positions))


def rows(values):
    """Settings of one row for each (temperature, top_k, top_p, seed)."""
    names = ("temperature", "top_k", "top_p", "seed")
    options = [SamplingOptions(**dict(zip(names, row, strict=True))) for row in values]
    return stack_settings(options)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def test_the_likeliest_is_the_first_of_the_largest(rng):
    logits = rng.integers(-3, 3, (50, 9)).astype(np.float32)  # ties
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[0] = -np.inf
    assert sampling.likeliest(jnp.asarray(logits)).tolist() == logits.argmax(axis=1).tolist()


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 1e-30, 1e-6]))
def test_no_temperature_takes_the_likeliest_token(seed, temperature):
    logits = np.random.default_rng(seed).permutation(VOCAB).astype(np.float32)[None] / 4
    for position in (1, 17):
        options = rows([(temperature, 0, 1.0, seed)])
        assert int(choose(logits, options, jnp.array([position]))[0]) == logits.argmax()


def draws(logits, options, seeds, positions):
    """One token for each seed and position."""
    one = (jnp.asarray(logits)[None], make_settings(SamplingOptions(**options), [0]))
    tiled, same = jax.tree.map(lambda x: jnp.repeat(x, len(seeds), axis=0), one)
    settings_ = same._replace(seed=jnp.asarray(seeds, jnp.uint32))
    return np.asarray(choose(tiled, settings_, jnp.asarray(positions)))


@pytest.mark.parametrize("along", ["positions", "seeds"])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 1.0},
        {"temperature": 1.5, "top_k": 5, "top_p": 1.0},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1.0, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_softmax_of_what_is_kept(options, along):
    """Pearson's chi-square of 100,000 draws; for a right sampler p < 0.01 once in a hundred."""
    logits = normal(12, seed=3, scale=0.7)
    counter, fixed = list(range(NUM_DRAWS)), [7] * NUM_DRAWS
    seeds, positions = (fixed, counter) if along == "positions" else (counter, fixed)
    counts = np.bincount(draws(logits, options, seeds, positions), minlength=12)
    target = warped(logits, SamplingOptions(**options))
    expected = scipy.special.softmax(target.astype(np.float64)) * NUM_DRAWS
    assert counts[expected == 0].sum() == 0
    assert expected[expected > 0].min() > 30
    p = scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue
    print(f"{options} along {along}: p = {p:.3f}")
    assert p > 0.01


def test_a_draw_depends_on_its_seed_and_position_alone():
    logits = normal((6, VOCAB), seed=1)
    options = [
        (1.0, 0, 1.0, 3), (0.0, 0, 1.0, 3), (0.7, 5, 1.0, 9),
        (1.3, 0, 0.9, 2**32 - 1), (2.0, 9, 0.5, 0), (1.0, 0, 1.0, 9),
    ]  # fmt: skip
    positions = np.array([4, 4, 1, 2047, 0, 4], np.int32)
    together = np.asarray(choose(logits, rows(options), positions))
    order = np.array([3, 1, 5, 0, 4, 2])
    shuffled = choose(logits[order], rows([options[i] for i in order]), positions[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for i, option in enumerate(options):
        alone = choose(logits[i : i + 1], rows([option]), positions[i : i + 1])
        assert int(alone[0]) == together[i]


def test_other_seeds_and_positions_give_other_draws():
    flat = np.zeros(VOCAB, np.float32)
    options = {"temperature": 1.0, "top_p": 1.0}
    base = draws(flat, options, [5] * 64, range(64))
    assert len(set(base.tolist())) > 20
    np.testing.assert_array_equal(draws(flat, options, [5] * 64, range(64)), base)
    for seeds, positions in (([6] * 64, range(64)), ([5] * 64, range(64, 128))):
        assert np.mean(draws(flat, options, seeds, positions) == base) < 0.2
