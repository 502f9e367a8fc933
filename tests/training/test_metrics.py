"""Metrics next to scikit-learn's and scipy's, on random predictions and at the edges."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

from neo_jax.labels import HeadConfig
from neo_jax.training import metrics

REFERENCES = {
    "accuracy": theirs.accuracy_score,
    "f1": lambda y, p: theirs.f1_score(y == 1, p == 1, zero_division=0),
    "macro_f1": lambda y, p: theirs.f1_score(y, p, average="macro", zero_division=0),
    "matthews": theirs.matthews_corrcoef,
    "pearson": lambda y, p: stats.pearsonr(y, p)[0],
    "spearman": lambda y, p: stats.spearmanr(y, p)[0],
}


@pytest.mark.parametrize("name", metrics.METRICS)
def test_random_predictions(name):
    rng = np.random.default_rng(0)
    for labels in (2, 3):
        for _ in range(20):
            y, p = rng.integers(0, labels, (2, rng.integers(5, 60)))
            if name in ("pearson", "spearman"):
                p = p + rng.normal(size=len(p)).round(1)
            with warnings.catch_warnings(action="ignore"):
                expected = REFERENCES[name](y, p)
            if not np.isnan(expected):
                assert metrics.METRICS[name](y, p) == pytest.approx(expected, abs=1e-12)


def test_several_labels_a_text():
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (2, 30, 4))
    assert metrics.f1(y, p) == pytest.approx(theirs.f1_score(y, p, average="micro"), abs=1e-12)
    assert metrics.accuracy(y, p) == pytest.approx(theirs.accuracy_score(y, p), abs=1e-12)


def test_what_is_constant_has_no_correlation():
    ones, mixed = np.ones(4), np.array([0, 1, 1, 0])
    for name in ("matthews", "pearson", "spearman"):
        assert metrics.METRICS[name](mixed, ones) == 0
    assert metrics.f1(np.zeros(3), np.zeros(3)) == 0


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-A I-A O B-B", {("A", 0, 1), ("B", 3, 3)}),
        ("B-A B-A I-A", {("A", 0, 0), ("A", 1, 2)}),
        ("I-A I-A O I-B", {("A", 0, 1), ("B", 3, 3)}),  # conlleval takes an I for the beginning
        ("B-A I-B I-B", {("A", 0, 0), ("B", 1, 2)}),
        ("O B-A-X I-A-X O", {("A-X", 1, 2)}),
        ("O O", set()),
    ],
)
def test_entities_are_those_of_conlleval(tags, found):
    assert metrics.entities(tags.split()) == found


def test_the_f1_of_entities():
    """Of all texts together; one that is too long by a word is wrong."""
    right = [["B-A", "I-A", "O"], ["B-B", "O", "B-A"]]
    said = [["B-A", "I-A", "I-A"], ["B-B", "O", "B-A"]]
    assert metrics.entity_f1(right, right) == 1
    assert metrics.entity_f1(right, said) == pytest.approx(2 * 2 / (3 + 3))
    assert metrics.entity_f1([["O"]], [["O"]]) == 0
    head = HeadConfig("classifier", ("B-A", "I-A", "O"))
    texts = [(np.array([0, 1, 2]), np.array([0, 1, 1])), (np.array([0]), np.array([0]))]
    names = metrics.usual_metrics(head)
    found = metrics.measure_words(names, texts, head)
    assert found == {"entity_f1": pytest.approx(2 / 4), "accuracy": 0.75}
    plain = HeadConfig("classifier", ("NOUN", "VERB"))
    assert metrics.usual_metrics(plain) == ("accuracy", "macro_f1")


def test_the_nearest_of_several_answers_counts():
    found = metrics.measure_answers(
        ("squad_f1", "squad_em"), [["a red fox", "The fox!"], ["dog"]], ["fox", "big dog"]
    )
    assert found == {"squad_f1": pytest.approx((1 + 2 / 3) / 2), "squad_em": 0.5}


def test_no_answer_is_right_where_there_is_none():
    """As SQuAD 2.0's script has it: of the last a wrong one, and none where there is one."""
    found = metrics.measure_answers(
        ("squad_f1", "squad_em"), [["fox"], [""], [""], ["fox"]], ["fox", "", "fox", ""]
    )
    assert found == {"squad_f1": 0.5, "squad_em": 0.5}
