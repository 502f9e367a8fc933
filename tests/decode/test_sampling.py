"""decode/sampling.py: which tokens are kept, and how they are drawn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neo_jax.decode import sampling
from neo_jax.decode.sampling import (
    History,
    SamplingOptions,
    Settings,
    make_settings,
    stack_settings,
)
from neo_jax.errors import NeoError

pytestmark = pytest.mark.optimized

ROWS, VOCAB, LENGTH = 4, 32, 24
EOS = 3
NUM_DRAWS = 100_000

choose_after = jax.jit(lambda *args: sampling.choose(*args, (EOS,)))
processed = jax.jit(lambda *args: sampling.processed(*args, (EOS,)))


def texts_of(lengths):
    """Histories that only count: no setting looks at their tokens."""
    lengths = jnp.asarray(lengths, jnp.int32)
    return History(jnp.zeros((len(lengths), 1), jnp.int32), lengths, lengths, lengths + LENGTH)


def choose(logits, settings, positions):
    return choose_after(logits, settings, texts_of(positions))


def kept_tokens(logits, settings):
    return jnp.isfinite(processed(logits, settings, texts_of([1] * len(logits))))


def rows(values):
    """Settings of one row for each (temperature, top_k, top_p, seed)."""
    names = ("temperature", "top_k", "top_p", "seed")
    options = [SamplingOptions(**dict(zip(names, row, strict=True))) for row in values]
    return stack_settings(options)


def normal(shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def warpers_of(options, prompt_length, limit):
    """What transformers' generate() does, in its order; temperature 0 is do_sample=False."""
    found = LogitsProcessorList()
    if options.repetition_penalty != 1:
        found.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.bad_words_ids and {*options.bad_words_ids} != {(EOS,)}:
        found.append(NoBadWordsLogitsProcessor([*map(list, options.bad_words_ids)], EOS))
    if options.min_new_tokens:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, options.min_new_tokens, EOS))
    if options.forced_bos_token_id >= 0:
        found.append(ForcedBOSTokenLogitsProcessor(options.forced_bos_token_id))
    if options.forced_eos_token_id >= 0:
        found.append(ForcedEOSTokenLogitsProcessor(limit, options.forced_eos_token_id))
    if options.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor([*options.suppress_tokens]))
    if options.begin_suppress_tokens:
        begin = prompt_length + (prompt_length == 1 and options.forced_bos_token_id >= 0)
        found.append(SuppressTokensAtBeginLogitsProcessor([*options.begin_suppress_tokens], begin))
    if not options.temperature:
        return found
    found.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        found.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        found.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        found.append(MinPLogitsWarper(options.min_p))
    return found


def warped(logits, options, text=(0,), prompt_length=1, limit=LENGTH):
    """Logits of one row as transformers' generate() warps them; -inf where it drops a token."""
    ids = torch.tensor([list(text)])
    return warpers_of(options, prompt_length, limit)(ids, torch.from_numpy(logits[None]))[0].numpy()


def is_near_tie(logits, options, *text):
    """Whether a probability lies so near top_p or min_p that rounding decides."""
    before = dataclasses.replace(options, top_p=1.0, min_p=0.0)
    kept = warped(logits, before, *text).astype(np.float64)
    probabilities = np.sort(np.exp(kept - kept.max()))[::-1]
    sums = np.cumsum(probabilities / probabilities.sum())
    return (
        np.abs(sums - options.top_p).min() < 1e-5
        or np.abs(probabilities - options.min_p).min() < 1e-5
    )


SETTINGS = {
    "temperature": st.just(0.0) | st.floats(0.25, 4, width=32),
    "top_k": st.just(0) | st.integers(1, VOCAB + 8),
    "top_p": st.just(1.0) | st.floats(0.0625, 0.96875, width=32),
    "min_p": st.just(0.0) | st.floats(0.015625, 1, width=32),
    "repetition_penalty": st.just(1.0) | st.floats(0.5, 3, width=32),
    "no_repeat_ngram_size": st.integers(0, 4),
    "min_new_tokens": st.just(0) | st.integers(1, 10),
    # Of the ids of `texts`, and some beyond; of what is forced, those that others do not ban.
    "suppress_tokens": st.lists(st.integers(0, 8), max_size=4).map(tuple),
    "begin_suppress_tokens": st.lists(st.integers(0, 8), max_size=20).map(tuple),
    "bad_words_ids": st.lists(
        st.lists(st.integers(0, 5), min_size=1, max_size=5).map(tuple), max_size=24, unique=True
    ).map(lambda words: tuple(word for word in words if word != (EOS,))),
    "forced_bos_token_id": st.just(-1) | st.integers(9, 12),
    "forced_eos_token_id": st.just(-1) | st.integers(9, 12),
}
ONE_AT_A_TIME = st.one_of(
    *(
        st.builds(SamplingOptions, **{"top_p": st.just(1.0)} | {name: values})
        for name, values in SETTINGS.items()
    )
)
texts = st.tuples(
    st.lists(st.integers(0, 5), min_size=1, max_size=LENGTH),
    st.integers(1, LENGTH),
    st.integers(1, 3),  # tokens that may still come
)


def test_the_likeliest_is_the_first_of_the_largest(rng):
    logits = rng.integers(-3, 3, (50, 9)).astype(np.float32)  # ties
    logits[rng.random(logits.shape) < 0.3] = -np.inf
    logits[0] = -np.inf
    assert sampling.likeliest(jnp.asarray(logits)).tolist() == logits.argmax(axis=1).tolist()


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    options=st.lists(
        ONE_AT_A_TIME | st.builds(SamplingOptions, **SETTINGS), min_size=ROWS, max_size=ROWS
    ),
    rows_=st.lists(texts, min_size=ROWS, max_size=ROWS),
)
def test_logits_are_processed_as_in_transformers(seed, scale, options, rows_):
    logits = normal((ROWS, VOCAB), seed, scale)
    assert all(len(set(row)) == VOCAB for row in logits.tolist())
    # What lies beyond a text is not read: here it is tokens that would be penalized.
    tokens = np.random.default_rng(seed).integers(0, 6, (ROWS, LENGTH)).astype(np.int32)
    for row, (text, *_) in zip(tokens, rows_, strict=True):
        row[: len(text)] = text
    prompts = [min(prompt, len(text)) for text, prompt, _ in rows_]
    lengths = np.array([len(text) for text, *_ in rows_])
    limits = lengths + [left for *_, left in rows_]
    history = History(tokens, lengths, np.array(prompts), limits)
    found = np.asarray(processed(logits, stack_settings(options), history))
    for mine, row, option, (text, *_), *counts in zip(
        found, logits, options, rows_, prompts, limits.tolist(), strict=True
    ):
        if option.temperature and is_near_tie(row, option, text, *counts):
            continue
        expected = warped(row, option, text, *counts)
        np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(expected), str(option))
        np.testing.assert_allclose(mine, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("option", "text", "banned"),
    [
        ({"no_repeat_ngram_size": 1}, [5, 6, 5], [5, 6]),
        ({"no_repeat_ngram_size": 2}, [5, 6, 7, 5], [6]),
        ({"no_repeat_ngram_size": 2}, [5, 6, 5, 7, 5], [6, 7]),
        ({"no_repeat_ngram_size": 2}, [5, 5, 5], [5]),
        ({"no_repeat_ngram_size": 3}, [5, 6, 7, 8, 6], []),
        ({"no_repeat_ngram_size": 3}, [5, 6, 7, 8, 5, 6], [7]),
        ({"no_repeat_ngram_size": 4}, [5, 6], []),
        ({"min_new_tokens": 2}, [5, 6, 7], [EOS]),  # one token is new
        ({"min_new_tokens": 1}, [5, 6, 7], []),
        ({"suppress_tokens": [5, EOS]}, [5, 6, 7], [EOS, 5]),
        ({"begin_suppress_tokens": [5]}, [6, 7], [5]),
        ({"begin_suppress_tokens": [5]}, [6, 7, 8], []),
        ({"bad_words_ids": [[5, 6], [9], [7, 8, 5, 4], [8, 7]]}, [7, 8, 5], [4, 6, 9]),
        ({"bad_words_ids": [[1, 2, 3, 4, 5, 6]]}, [1, 2, 3, 4, 5], [6]),
        ({"bad_words_ids": [[0, 5, 9, 6]]}, [5, 9], []),  # what is before a text is no token
        ({"bad_words_ids": [[7]] * 17 + [[5]]}, [6, 6], [5, 7]),
    ],
    ids=str,
)
def test_what_is_banned(option, text, banned):
    length = jnp.array([len(text)])
    history = History(jnp.array([text]), length, jnp.array([2]), length + 9)
    logits = jnp.zeros((1, VOCAB))
    options = stack_settings([SamplingOptions(temperature=0.0, **option)])
    found = processed(logits, options, history)
    assert np.flatnonzero(np.isinf(found[0])).tolist() == banned
    assert int(choose_after(logits, options, history)[0]) not in banned


def test_without_an_end_of_text_none_is_banned():
    options = stack_settings([SamplingOptions(min_new_tokens=5, temperature=0.0)])
    found = sampling.processed(jnp.zeros((1, VOCAB)), options, texts_of([1]), ())
    assert np.isfinite(found).all()


def test_every_end_of_text_is_banned():
    options = stack_settings([SamplingOptions(min_new_tokens=5, temperature=0.0)])
    found = sampling.processed(jnp.zeros((1, VOCAB)), options, texts_of([1]), (EOS, 7))
    assert np.flatnonzero(np.isinf(found[0])).tolist() == [EOS, 7]


def test_what_is_forced():
    """First where a prompt is one token, and last where no more may come."""
    one = SamplingOptions(temperature=0.0, forced_bos_token_id=5, forced_eos_token_id=6)
    lengths = jnp.array([1, 2, 3, 9])
    history = History(jnp.zeros((4, 9), jnp.int32), lengths, jnp.array([1, 2, 1, 1]), lengths + 2)
    history = history._replace(limits=jnp.array([9, 9, 4, 10]))
    logits = jnp.zeros((4, VOCAB)).at[:, 8].set(1.0)
    found = choose_after(logits, stack_settings([one] * 4), history)
    assert found.tolist() == [5, 8, 6, 6]


def test_what_is_not_written_first_waits_for_what_is_forced():
    one = SamplingOptions(temperature=0.0, forced_bos_token_id=5, begin_suppress_tokens=[8])
    lengths = jnp.array([1, 2, 3])
    history = History(jnp.zeros((3, 9), jnp.int32), lengths, jnp.ones(3, jnp.int32), lengths + 9)
    logits = jnp.zeros((3, VOCAB)).at[:, 8].set(1.0)
    assert choose_after(logits, stack_settings([one] * 3), history).tolist() == [5, 0, 8]


def test_a_repetition_penalty_is_that_of_a_text():
    """CTRL's: above 0 a logit is divided, below it is multiplied; once, however often it stands."""
    history = History(jnp.array([[0, 1, 1, 2]]), jnp.array([3]), jnp.array([1]), jnp.array([9]))
    options = stack_settings([SamplingOptions(temperature=0.0, repetition_penalty=2.0)])
    found = processed(jnp.array([[3.0, -3.0, 4.0]]), options, history)
    assert found.tolist() == [[1.5, -6.0, 4.0]]
    assert int(choose_after(jnp.array([[3.0, -3.0, 1.75]]), options, history)[0]) == 2


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "kept"),
    [
        (0, 1.0, 0.0, [0, 1, 2, 3]),
        (2, 1.0, 0.0, [0, 1]),
        (99, 1.0, 0.0, [0, 1, 2, 3]),
        (0, 0.49, 0.0, [0]),
        (0, 0.51, 0.0, [0, 1]),
        (0, 0.81, 0.0, [0, 1, 2]),
        (0, 1e-6, 0.0, [0]),
        (2, 0.6, 0.0, [0]),  # of what top-k left, the first has 0.5 / 0.8
        (2, 0.63, 0.0, [0, 1]),
        (0, 1.0, 0.29, [0, 1, 2]),  # 0.15 is 0.3 of the likeliest
        (0, 1.0, 0.31, [0, 1]),
        (0, 1.0, 1.0, [0]),
        (0, 0.51, 0.05, [0, 1]),
    ],
)
def test_the_kept_tokens_of_a_known_distribution(top_k, top_p, min_p, kept):
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    options = SamplingOptions(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    marks = kept_tokens(logits, stack_settings([options]))
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


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), temperature=st.sampled_from([0.0, 1e-30, 1e-6]))
def test_no_temperature_takes_the_likeliest_token(seed, temperature):
    logits = np.random.default_rng(seed).permutation(VOCAB).astype(np.float32)[None] / 4
    for position in (1, 17):
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


def test_settings_of_many_rows():
    options = SamplingOptions(0.5, 3, 0.25, 0.125, 1.5, 2, 4, seed=11)
    made = make_settings(options, [11, 2**32 - 1])
    assert [leaf.tolist() for leaf in made] == [
        [0.5, 0.5], [3, 3], [0.25, 0.25], [0.125, 0.125], [1.5, 1.5], [2, 2], [4, 4],
        [11, 2**32 - 1], [-1, -1], [-1, -1], np.full((2, 16, 4), -1).tolist(),
        np.zeros((2, 16)).tolist(),
    ]  # fmt: skip
    assert [leaf.dtype for leaf in made] == [
        np.float32, np.int32, np.float32, np.float32, np.float32, np.int32, np.int32, np.uint32,
        np.int32, np.int32, np.int32, bool,
    ]  # fmt: skip
    assert all(leaf.shape[0] == 0 for leaf in make_settings(options, []))
    both = stack_settings([options, SamplingOptions(seed=5)])
    assert [leaf.tolist()[0] for leaf in both] == [leaf.tolist()[0] for leaf in made]
    plain = {f.name for f in dataclasses.fields(SamplingOptions) if f.default != ()}
    assert set(Settings._fields) == plain | {"bans", "bans_first"}


def test_bans_have_room_in_few_sizes():
    """So that requests share programs; what few requests have fits the smallest."""
    few = SamplingOptions(suppress_tokens=range(16), bad_words_ids=[])
    many = SamplingOptions(bad_words_ids=[range(5), *([i] for i in range(16))])
    assert sampling.size_of_bans([SamplingOptions(), few]) == (16, 4)
    assert sampling.size_of_bans([few, many]) == (32, 8)
    assert sampling.size_of_bans([]) == (16, 4)
    assert stack_settings([few], (32, 8)).bans.shape == (1, 32, 8)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature must lie between 0 and 1e.06, not be -0.1"),
        ({"temperature": float("nan")}, "temperature must lie between 0 and 1e.06, not be nan"),
        ({"temperature": 1e300}, "temperature must lie between 0 and 1e.06, not be 1e.300"),
        ({"top_k": -1}, "top_k must be a whole number from 0 .off. to 2..31 - 1, not -1"),
        (
            {"top_k": 2**31},
            "top_k must be a whole number from 0 .off. to 2..31",
        ),
        ({"top_p": 0.0}, "top_p must lie in .0, 1., not 0.0; 1 is off"),
        ({"top_p": 1.01}, "top_p must lie in"),
        ({"top_p": float("nan")}, "top_p must lie in"),
        ({"min_p": -0.1}, "min_p must lie in .0, 1., not -0.1; 0 is off"),
        ({"min_p": float("nan")}, "min_p must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and at most"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number from 0"),
        ({"min_new_tokens": -2}, "min_new_tokens must be a whole number from 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list, not 5"),
        ({"suppress_tokens": [True]}, "an id of suppress_tokens must be a whole number, not True"),
        ({"begin_suppress_tokens": [3, -2]}, "begin_suppress_tokens holds -2, which is no id"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list, not 5"),
        ({"bad_words_ids": [[]]}, "bad_words_ids holds a word of no ids; leave it out"),
        ({"forced_eos_token_id": -2}, "forced_eos_token_id must be an id, or -1 for none, not -2"),
        (
            {"forced_bos_token_id": 4, "suppress_tokens": [3, 4]},
            "forced_bos_token_id 4 is one of suppress_tokens; leave out one of them",
        ),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(NeoError, match=message):
        SamplingOptions(**option)
