"""Metrics next to scikit-learn's and scipy's, on random predictions and at the edges."""

import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as theirs

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
