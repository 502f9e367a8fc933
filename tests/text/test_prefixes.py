"""text/prefixes.py: prompts behind embeddings of their own, by those that are words' embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neo_jax
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.evaluation.loglikelihood import Continuation, score_continuations
from neo_jax.model.prefix_mapper import MAPPER, init_mapper, map_features
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.text import inspection
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.prefixes import with_features, with_prefixes
from neo_jax.text.score import score_ids

GREEDY = SamplingOptions(temperature=0.0)
WORDS = np.array([[5, 80, 41], [300, 7, 7], [9, 9, 200]])
TEXTS = ["The quick brown fox", "jumps", "over the lazy dog, and so do I"]


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["pieces"])


@pytest.fixture(scope="module")
def table(lm):
    return np.asarray(lm.params["wte"]["embedding"])


@pytest.fixture(scope="module")
def soft(lm, table):
    """A model whose soft prompt is the words of the first row."""
    model = lm.model.clone(virtual_tokens=3, soft_prompt=3)
    params = lm.params | {PROMPT: jnp.asarray(table[WORDS[0]])}
    return LanguageModel(model, params, lm.tokenizer, lm.folder)


def told(lm, texts=TEXTS, words=WORDS):
    return [[*row.tolist(), *lm.encode(text)] for row, text in zip(words, texts, strict=True)]


def test_a_prefix_of_each_prompt(lm, table):
    known, prompts = with_prefixes(lm, table[WORDS], TEXTS)
    found = known.sample(prompts, 8, sampling=GREEDY)
    expected = lm.sample(told(lm), 8, sampling=GREEDY)
    assert [text.ids for text in found] == [text.ids for text in expected]
    assert [text.text for text in found] == [text.text for text in expected]
    bare, prompts = with_prefixes(lm, table[WORDS], [""] * 3)
    expected = lm.sample(WORDS.tolist(), 8, sampling=GREEDY)
    assert [text.ids for text in bare.sample(prompts, 8, sampling=GREEDY)] == [
        text.ids for text in expected
    ]


def test_scores_behind_prefixes(lm, table):
    known, prompts = with_prefixes(lm, table[WORDS], TEXTS)
    for mine, other, text in zip(known.score(prompts), lm.score(told(lm)), TEXTS, strict=True):
        np.testing.assert_array_equal(mine.logprobs, other.logprobs[2:])
        assert mine.num_bytes == len(text.encode())
    long = np.random.default_rng(0).integers(3, 320, 150).tolist()
    known, (ids,) = with_prefixes(lm, table[WORDS[:1]], [long])
    (found,) = score_ids(known.model, known.params, [ids], stride=20)
    assert found.shape == (150,)
    windows = [long[max(stop - 62, 0) : stop] for stop in (62, 82, 102, 122, 142, 150)]
    each = [lm.score([[*WORDS[0].tolist(), *window]])[0].logprobs[2:] for window in windows]
    scored = np.concatenate([each[0], *(row[-20:] for row in each[1:-1]), each[-1][-8:]])
    np.testing.assert_allclose(found, scored, rtol=0, atol=1e-5)


def test_a_soft_prompt_is_before_all_that_is_scored_and_embedded(lm, soft):
    words = WORDS[:1].repeat(3, 0)
    expected = lm.score(told(lm, words=words))
    for mine, other, text in zip(soft.score(TEXTS), expected, TEXTS, strict=True):
        assert mine.ids == lm.encode(text)
        np.testing.assert_array_equal(mine.logprobs, other.logprobs[3:])
    context, answer = lm.encode(TEXTS[0]), lm.encode(TEXTS[1])
    asked = [Continuation(context, answer), Continuation(context[:2], answer)]
    behind = [Continuation([*WORDS[0].tolist(), *one], new) for one, new in asked]
    found = dict(score_continuations(soft.model, soft.params, asked))
    wanted = dict(score_continuations(lm.model, lm.params, behind))
    assert {i: x.greedy for i, x in found.items()} == {i: x.greedy for i, x in wanted.items()}
    for i, likelihood in found.items():
        assert likelihood.logprob == pytest.approx(wanted[i].logprob, abs=1e-5)
    ids = told(lm, words=words)
    for layer, pooling in ((1, ""), (-1, "last"), (-1, "mean")):
        mine = soft.embed(TEXTS, layer, pooling)
        states = [state[3:] for state in inspection.hidden_states(lm.model, lm.params, ids, layer)]
        if pooling:
            states = [state[-1] if pooling == "last" else state.mean(0) for state in states]
        for one, other in zip(mine, states, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(soft.attention(TEXTS[0], 1), lm.attention(ids[0], 1))


def test_a_soft_prompt_before_prefixes_and_streams(lm, soft, table):
    known, prompts = with_prefixes(soft, table[WORDS[1:]], TEXTS[1:])
    ids = [[*WORDS[0].tolist(), *ids] for ids in told(lm, TEXTS[1:], WORDS[1:])]
    expected = lm.sample(ids, 8, sampling=GREEDY)
    assert [x.ids for x in known.sample(prompts, 8, sampling=GREEDY)] == [x.ids for x in expected]
    streamed = "".join(soft.stream(TEXTS[0], 8, temperature=0))
    prompt = [*WORDS[0].tolist(), *lm.encode(TEXTS[0])]
    assert streamed == lm.sample([prompt], 8, sampling=GREEDY)[0].text
    cut = soft.sample([list(range(3, 100))], 8, sampling=GREEDY, on_overflow="truncate")
    assert len(cut[0].ids) == 8


@pytest.mark.parametrize("hidden", [0, 5])
def test_features_are_mapped(lm, hidden):
    mapper = init_mapper(jax.random.key(0), 6, 3, 32, hidden)
    model = LanguageModel(lm.model, lm.params | {MAPPER: mapper}, lm.tokenizer, lm.folder)
    features = np.random.default_rng(0).normal(size=(3, 6))
    kernels = {name: np.asarray(layer["kernel"]) for name, layer in mapper.items()}
    x = np.tanh(features @ kernels["hidden"].T) if hidden else features
    expected = np.einsum("bi,kdi->bkd", x, kernels["out"])
    np.testing.assert_allclose(map_features(mapper, jnp.float32(features)), expected, atol=1e-5)
    known, prompts = with_features(model, features, TEXTS)
    found = known.sample(prompts, 8, sampling=GREEDY)
    other, prompts = with_prefixes(lm, expected, TEXTS)
    assert [x.ids for x in found] == [x.ids for x in other.sample(prompts, 8, sampling=GREEDY)]


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (np.zeros((3, 2, 16)), "prefixes are 16 wide, and the model 32"),
        (np.zeros((3, 32)), "prefixes are of shape [3, 32]; give [prompts, embeddings, width]"),
        (np.zeros((3, 0, 32)), "prefixes are of shape [3, 0, 32]"),
        (np.zeros((2, 2, 32)), "2 prefixes are for as many prompts, not 3"),
        (np.full((3, 2, 32), np.nan), "prefixes hold numbers that are not finite"),
        ([["a"]], "prefixes are no array of numbers"),
    ],
)
def test_prefixes_that_cannot_be(lm, prefixes, message):
    with pytest.raises(NeoError) as error:
        with_prefixes(lm, prefixes, TEXTS)
    assert message in str(error.value)


def test_what_else_cannot_be(lm, table):
    with pytest.raises(NeoError, match="the model maps no features; load what a run with"):
        with_features(lm, np.zeros((3, 6)), TEXTS)
    mapper = init_mapper(jax.random.key(0), 6, 3, 32)
    model = LanguageModel(lm.model, lm.params | {MAPPER: mapper}, lm.tokenizer, lm.folder)
    for features, message in (
        (np.zeros((3, 5)), r"features are of shape \[3, 5\]; the model maps \[texts, 6\]"),
        (np.full((3, 6), np.inf), "features hold numbers that are not finite"),
        ({}, "features are no array of numbers"),
    ):
        with pytest.raises(NeoError, match=message):
            with_features(model, features, TEXTS)
    known, prompts = with_prefixes(lm, np.repeat(table[WORDS], 20, 1), TEXTS)
    with pytest.raises(NeoError, match="exceed the context of 64"):
        known.sample(prompts, 8)
    with pytest.raises(NeoError, match="no room"):
        known.score([[*prompts[0][:60], *range(327, 335), 5]])


def test_on_a_mesh(lm, checkpoints, table):
    shared = neo_jax.load(checkpoints["pieces"], mesh="data=2,fsdp=2,model=2")
    known, prompts = with_prefixes(shared, table[WORDS], TEXTS)
    found = known.sample(prompts, 8, sampling=GREEDY)
    expected = lm.sample(told(lm), 8, sampling=GREEDY)
    assert [text.ids for text in found] == [text.ids for text in expected]
    for mine, other in zip(known.score(prompts), lm.score(told(lm)), strict=True):
        np.testing.assert_allclose(mine.logprobs, other.logprobs[2:], rtol=0, atol=1e-5)
    assert dataclasses.is_dataclass(found[0])
