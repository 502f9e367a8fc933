"""text/score.py: given tokens, within the context and beyond it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import tuning
from neo_jax.text import score as scoring
from neo_jax.text.score import Question, score_ids, score_rows

CONTEXT = 64
LENGTHS = [17, 1, 64, 2, 16, 33, 63, 5, 40]


def random_texts(lengths, vocab=96):
    rng = np.random.default_rng(0)
    return [rng.integers(0, vocab, length).tolist() for length in lengths]


def score(model, params, texts, stride=0):
    return list(score_ids(model, params, texts, stride))


def assert_close(scores, expected):
    assert len(scores) == len(expected)
    for ours, plain in zip(scores, expected, strict=True):
        assert ours.dtype == np.float32
        assert ours.shape == plain.shape
        np.testing.assert_allclose(ours, plain, rtol=0, atol=5e-6)


@pytest.fixture(scope="module")
def wide(tiny):
    """A model whose next token depends on all that it sees."""
    model, params = tiny
    return model, jax.tree.map_with_path(
        lambda path, leaf: 2 * leaf if path[-1].key in ("kernel", "embedding") else leaf, params
    )


@pytest.fixture(scope="module")
def plain(wide):
    """One token at a time: log p(token | context), the context stated."""
    model, params = wide

    @jax.jit
    def last_logprobs(tokens, length):
        logits = model.apply({"params": params}, tokens[None]).logits[0, length - 1]
        return jax.nn.log_softmax(logits)

    def logprob(context, token):
        assert 0 < len(context) <= CONTEXT
        padded = np.zeros(CONTEXT, np.int32)
        padded[: len(context)] = context
        return last_logprobs(padded, len(context))[token]

    return logprob


def test_texts_within_the_context_are_scored_by_one_forward_pass(wide):
    model, params = wide
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)
    texts = random_texts(LENGTHS)
    expected = []
    for ids in texts:
        tokens = np.array([ids + [0] * (CONTEXT - len(ids))])
        logprobs = np.asarray(jax.nn.log_softmax(forward(tokens)))[0, : len(ids) - 1]
        expected.append(logprobs[np.arange(len(ids) - 1), ids[1:]])
    assert_close(score(model, params, texts), expected)
    assert max(row.max() - row.min() for row in expected if len(row)) > 1


@pytest.mark.parametrize("stride", [0, 1, 7, 32, 64])
def test_windows_beyond_the_context(wide, plain, stride):
    """Each token by itself, from the context that the module's docstring gives it."""
    model, params = wide
    texts = random_texts([65, 66, 150, 64, 97, 20])
    step = stride or CONTEXT // 2
    expected = []
    for ids in texts:
        row = []
        for t in range(1, len(ids)):
            first = 0
            if t > CONTEXT:  # in the window, `step` tokens on from the last, that first scores t
                windows = (t - CONTEXT - 1) // step + 1
                first = min(CONTEXT + 1 + windows * step, len(ids)) - CONTEXT - 1
                assert t - first > CONTEXT - step
            row.append(plain(ids[first:t], ids[t]))
        expected.append(np.array(row, np.float32))
    assert_close(score(model, params, texts, stride), expected)


def test_the_stride_matters_beyond_the_context_only(wide):
    model, params = wide
    (short, long), (also_short, other) = (
        score(model, params, random_texts([60, 100]), stride) for stride in (8, 63)
    )
    np.testing.assert_array_equal(short, also_short)
    np.testing.assert_allclose(long[:CONTEXT], other[:CONTEXT], rtol=0, atol=5e-6)
    assert np.abs(long[CONTEXT:] - other[CONTEXT:]).max() > 0.1


def test_what_else_is_scored_does_not_matter(wide):
    model, params = wide
    texts = random_texts([*LENGTHS, 150, 80])
    together = score(model, params, texts)
    assert_close(score(model, params, texts[::-1])[::-1], together)
    for ids, expected in list(zip(texts, together, strict=True))[::3]:
        assert_close(score(model, params, [ids]), [expected])


def test_small_batches_and_groups_change_nothing(wide, monkeypatch):
    model, params = wide
    texts = random_texts([*LENGTHS, 150, 80] * 3)
    together = score(model, params, texts)
    monkeypatch.setattr(tuning, "FORWARD_TOKENS", 128)
    assert len(list(scoring._groups(texts))) > 1
    assert_close(score(model, params, texts), together)


def test_results_flow_before_all_is_computed(wide, monkeypatch):
    model, params = wide
    monkeypatch.setattr(tuning, "FORWARD_TOKENS", 8)
    forward, calls = scoring._forward, []

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(scoring, "_forward", counted)
    scores = score_ids(model, params, random_texts([40] * 6))
    next(scores)
    first = len(calls)
    assert 0 < first < 6
    list(scores)
    assert len(calls) == 6


def test_blocks_of_positions_join(tiny_config):
    """Logits are formed for 256 positions at a time: a text of 300 takes two blocks."""
    model = Neo(dataclasses.replace(tiny_config, max_length=300))
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    ids = random_texts([300])[0]
    logits = jax.jit(model.apply)({"params": params}, jnp.array([ids])).logits
    expected = np.asarray(jax.nn.log_softmax(logits))[0, np.arange(299), ids[1:]]
    assert_close(score(model, params, [ids]), [expected])


def test_nothing_to_score(tiny):
    model, params = tiny
    assert score(model, params, []) == []
    assert [row.shape for row in score(model, params, [[7], [3]])] == [(0,), (0,)]


@pytest.mark.parametrize(
    ("texts", "stride", "message"),
    [
        ([[1], []], 0, "text 2 is empty; there is nothing to score"),
        ([[1, 96]], 0, "text 1 has a token id outside the vocabulary, 0 to 95"),
        ([[1], [2, 3], [-1]], 0, "text 3 has a token id outside the vocabulary"),
        ([[1, 2]], 65, "the stride must lie between 1 and 64, not 65"),
        ([[1, 2]], -1, "the stride must lie between 1 and 64, not -1"),
    ],
)
def test_what_cannot_be_scored(tiny, texts, stride, message):
    model, params = tiny
    with pytest.raises(NeoError, match=message):
        score(model, params, texts, stride)


def test_rows_are_asked_where_they_say(wide):
    """Some targets behind some tokens, several behind the same one; whether each is likeliest."""
    model, params = wide
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens).logits)
    texts = random_texts([20, 3, 41])
    asked = [[19, 19, 4], [2], [0, 40, 40, 40, 7]]
    rows, expected = [], []
    for ids, positions in zip(texts, asked, strict=True):
        logits = np.asarray(forward(np.array([ids + [0] * (CONTEXT - len(ids))])))[0, positions]
        targets = [int(row.argmax()) if i % 2 == 0 else i for i, row in enumerate(logits)]
        rows.append(Question(ids, positions, targets))
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(len(targets)), targets]
        expected.append((logprobs, [i % 2 == 0 for i in range(len(targets))]))
    for batch_size in (0, 1, 2):
        answers = dict(score_rows(model, params, rows, batch_size))
        assert sorted(answers) == [0, 1, 2]
        for i, (logprobs, greedy) in enumerate(expected):
            np.testing.assert_allclose(answers[i].logprobs, logprobs, rtol=0, atol=5e-6)
            assert answers[i].greedy.tolist() == greedy
