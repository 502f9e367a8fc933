"""Labels from logits, answers by likelihood, and one vector a text."""

import numpy as np
import pytest
from scipy import special

import neo_jax
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.text.classify import as_one_text, choose, classification

LOGITS = np.array([2.0, -1.0, 0.5], np.float32)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


def test_what_logits_say():
    one = classification(LOGITS, HeadConfig("score", ("a", "b", "c")))
    assert one.label == "a"
    np.testing.assert_allclose(one.probabilities, special.softmax(LOGITS), rtol=1e-6)
    head = HeadConfig("score", ("a", "b", "c"), "multi_label_classification")
    several = classification(LOGITS, head)
    assert several.label == "a,c"
    np.testing.assert_allclose(several.probabilities, special.expit(LOGITS), rtol=1e-6)
    number = classification(LOGITS[:1], HeadConfig("score", ("stars",), "regression"))
    assert (number.label, number.probabilities.tolist()) == ("stars", [2.0])


def test_a_pair_is_a_text():
    assert as_one_text(("a", "b")) == as_one_text(["a", "b"]) == "a\nb"
    assert as_one_text("ab") == "ab"
    assert as_one_text([1, 2]) == [1, 2]


def test_choices_have_the_likelihood_that_scores_have(lm):
    prompt, answers = lm.encode("The fox and"), [lm.encode(" the dog"), lm.encode(" a café")]
    (found,) = choose(lm.model, lm.params, [prompt], [answers])
    (mean,) = choose(lm.model, lm.params, [prompt], [answers], by_length=True)
    for i, answer in enumerate(answers):
        logprobs = lm.score([[*prompt, *answer]])[0].logprobs[len(prompt) - 1 :]
        assert found[i] == pytest.approx(logprobs.sum(), abs=1e-4)
        assert mean[i] == pytest.approx(logprobs.mean(), abs=1e-4)
    with pytest.raises(NeoError, match="have at least a token each"):
        choose(lm.model, lm.params, [prompt], [[[]]])


@pytest.mark.parametrize("mesh", ["", "data=2,model=2"])
def test_one_vector_a_text(checkpoints, lm, mesh):
    texts = ["The fox", "The quick brown fox jumps over the lazy dog", "I"]
    states = lm.embed(texts)
    split = neo_jax.load(checkpoints["bytes"], mesh=mesh) if mesh else lm
    for pooling, expected in (
        ("mean", [state.mean(axis=0) for state in states]),
        ("last", [state[-1] for state in states]),
        ("weighted", [np.average(s, axis=0, weights=range(1, len(s) + 1)) for s in states]),
    ):
        found = split.embed(texts, pooling=pooling)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        unit = split.embed(texts, pooling=pooling, normalize=True)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-5)
    assert lm.embed("The fox", pooling="last").shape == (32,)
    with pytest.raises(NeoError, match="normalize goes with a pooling: mean, last, weighted"):
        lm.embed("The fox", normalize=True)
    with pytest.raises(NeoError, match="no pooling is called 'max'"):
        lm.embed("The fox", pooling="max")
