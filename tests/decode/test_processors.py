"""decode/processors.py: what changes logits, as transformers does, and which tokens are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_warpers import EOS, LENGTH, warped
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.decode import sampling
from neo_jax.decode.options import SamplingOptions, stack_settings
from neo_jax.decode.processors import History

pytestmark = pytest.mark.optimized

ROWS, VOCAB = 4, 32

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


@given(
    biases=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9, width=16), max_size=20),
    penalties=st.tuples(*[st.just(0.0) | st.floats(-2, 2, width=16)] * 2),
    text=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    prompt=st.integers(1, 12),
)
@settings(max_examples=60)
def test_biases_and_penalties_of_new_tokens_are_those_of_openai(biases, penalties, text, prompt):
    """Of the new text alone: once for a token that it holds, and for each time that it does."""
    prompt = min(prompt, len(text))
    tokens = np.full((1, 16), 3, np.int32)  # what lies beyond the text counts for nothing
    tokens[0, : len(text)] = text
    lengths = [np.array([n]) for n in (len(text), prompt, len(text) + 4)]
    options = SamplingOptions(
        temperature=0.0, logit_bias=biases, presence_penalty=penalties[0],
        frequency_penalty=penalties[1],
    )  # fmt: skip
    logits = normal((1, VOCAB), len(text))
    found = processed(logits, stack_settings([options]), History(tokens, *lengths))
    counts = np.bincount(text[prompt:], minlength=VOCAB)
    expected = logits[0] - penalties[0] * (counts > 0) - penalties[1] * counts
    for token, bias in biases.items():
        expected[token] += bias
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


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
