"""neo_jax/decode/sampling.py: which tokens are kept, and how they are drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neo_jax.decode import sampling
from neo_jax.decode.sampling import SamplingOptions, Settings, make_settings
from neo_jax.errors import NeoError

choose = jax.jit(sampling.choose)
kept_tokens = jax.jit(sampling._kept)

ROWS, VOCAB = 4, 32
NUM_DRAWS = 100_000

temperatures = st.floats(0.25, 4, width=32)
top_ks = st.just(0) | st.integers(1, VOCAB + 8)
top_ps = st.just(1.0) | st.floats(0.0625, 0.96875, width=32)


def rows(values):
    """Settings of one row for each (temperature, top_k, top_p, seed)."""
    temperature, top_k, top_p, seed = zip(*values, strict=True)
    return Settings(
        jnp.array(temperature, jnp.float32),
        jnp.array(top_k, jnp.int32),
        jnp.array(top_p, jnp.float32),
        jnp.array(seed, jnp.uint32),
    )


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def warped(logits, temperature, top_k, top_p):
    """Logits of one row as transformers' generate() warps them; -inf where it drops a token."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, torch.from_numpy(logits[None]))[0].numpy()


def is_near_tie(logits, temperature, top_k, top_p):
    """Whether the next probability lies so near top_p that rounding decides."""
    kept = warped(logits, temperature, top_k, 1.0).astype(np.float64)
    probabilities = np.sort(np.exp(kept - kept.max()))[::-1]
    return np.abs(np.cumsum(probabilities / probabilities.sum()) - top_p).min() < 1e-5


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    options=st.lists(st.tuples(temperatures, top_ks, top_ps), min_size=ROWS, max_size=ROWS),
)
def test_the_kept_tokens_are_those_of_transformers(seed, scale, options):
    logits = normal((ROWS, VOCAB), seed, scale)
    assert all(len(set(row)) == VOCAB for row in logits.tolist())
    settings_ = rows([(*option, 0) for option in options])
    kept = np.asarray(kept_tokens(logits / settings_.temperature[:, None], settings_))
    for row, mine, option in zip(logits, kept, options, strict=True):
        if option[2] < 1 and is_near_tie(row, *option):
            continue
        np.testing.assert_array_equal(mine, np.isfinite(warped(row, *option)), str(option))


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [0, 1]),
        (99, 1.0, [0, 1, 2, 3]),
        (0, 0.49, [0]),
        (0, 0.51, [0, 1]),
        (0, 0.81, [0, 1, 2]),
        (0, 1e-6, [0]),
        (2, 0.6, [0]),  # of what top-k left, the first has 0.5 / 0.8
        (2, 0.63, [0, 1]),
    ],
)
def test_the_kept_tokens_of_a_known_distribution(top_k, top_p, kept):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    marks = kept_tokens(logits, rows([(1.0, top_k, top_p, 0)]))
    assert np.flatnonzero(marks[0]).tolist() == kept


@pytest.mark.parametrize("top_k", [0, 40_000])
@pytest.mark.parametrize("scale", [0.1, 2.0, 4.0])
def test_a_top_p_of_one_drops_nothing(scale, top_k):
    """Beside a row that truncates, and where rounded sums of probabilities reach 1 early."""
    logits = jnp.asarray(normal((2, 50_257), scale=scale))
    kept = kept_tokens(logits, rows([(1.0, top_k, 1.0, 0), (1.0, 5, 0.5, 0)]))
    assert int(kept[0].sum()) == (top_k or 50_257)


def test_a_top_p_of_almost_one_does_not_undo_top_k():
    logits = jnp.asarray(normal((64, 1000)))
    almost = float(np.nextafter(np.float32(1), np.float32(0)))
    kept = kept_tokens(logits, rows([(1.0, 700, almost, 0)] * 64))
    assert int(kept.sum(axis=-1).max()) <= 700


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 1e-30, 1e-6]))
def test_no_temperature_takes_the_likeliest_token(seed, temperature):
    logits = np.random.default_rng(seed).permutation(VOCAB).astype(np.float32)[None] / 4
    for position in (0, 17):
        options = rows([(temperature, 0, 1.0, seed)])
        assert int(choose(logits, options, jnp.array([position]))[0]) == logits.argmax()


def draws(logits, options, seeds, positions):
    """One token for each seed and position."""
    settings_ = make_settings(SamplingOptions(**options), seeds)
    tiled = jnp.broadcast_to(jnp.asarray(logits), (len(seeds), len(logits)))
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
    ],
    ids=str,
)
def test_draws_follow_the_softmax_of_what_is_kept(options, along):
    """Pearson's chi-square of 100,000 draws; for a right sampler p < 0.01 once in a hundred."""
    logits = normal(12, seed=3, scale=0.7)
    counter, fixed = list(range(NUM_DRAWS)), [7] * NUM_DRAWS
    seeds, positions = (fixed, counter) if along == "positions" else (counter, fixed)
    counts = np.bincount(draws(logits, options, seeds, positions), minlength=12)
    target = warped(logits, options["temperature"], options.get("top_k", 0), options["top_p"])
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


def test_settings_of_many_rows():
    made = make_settings(SamplingOptions(0.5, 3, 0.25, 11), [11, 2**32 - 1])
    assert [leaf.tolist() for leaf in made] == [[0.5, 0.5], [3, 3], [0.25, 0.25], [11, 2**32 - 1]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature must be 0 or more, and finite, not -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, and finite, not nan"),
        ({"temperature": float("inf")}, "temperature must be 0 or more, and finite, not inf"),
        ({"top_k": -1}, "top_k must be 0 .off. or more, not -1"),
        ({"top_p": 0.0}, "top_p must lie in .0, 1., not 0.0; 1 is off"),
        ({"top_p": 1.01}, "top_p must lie in"),
        ({"top_p": float("nan")}, "top_p must lie in"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(NeoError, match=message):
        SamplingOptions(**option)
