"""How well labels are predicted: what GLUE and SuperGLUE report, as numbers from 0 to 1 or -1 to 1.

Each is a function of labels and of predictions, arrays of whole numbers, or of numbers for the
correlations; they equal scikit-learn's and scipy's.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from neo_jax.labels import HeadConfig, ProblemType


def accuracy(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns the share of examples whose labels, one or several, are all right."""
    same = labels == found
    return float(np.mean(same if same.ndim == 1 else same.all(axis=1)))


def f1(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns 2 PR / (P + R) of label 1; where labels are ones and zeros [N, C], of all of them."""
    return _f1(labels == 1, found == 1)


def macro_f1(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns the mean over labels, those that are there or predicted, of the F1 of each."""
    return float(np.mean([_f1(labels == i, found == i) for i in np.union1d(labels, found)]))


def _f1(labels: np.ndarray, found: np.ndarray) -> float:
    both = np.count_nonzero(labels & found)
    total = np.count_nonzero(labels) + np.count_nonzero(found)
    return 2 * both / total if total else 0.0


def matthews(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns the correlation of labels (Matthews, 1975; of many Gorodkin, 2004); 0 if none."""
    names = np.union1d(labels, found)
    true, said = labels[:, None] == names, found[:, None] == names
    count = len(labels)
    hits = np.count_nonzero(labels == found)
    t, p = true.sum(axis=0).astype(float), said.sum(axis=0).astype(float)
    scale = np.sqrt((count**2 - p @ p) * (count**2 - t @ t))
    return float((hits * count - t @ p) / scale) if scale else 0.0


def pearson(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns the linear correlation; 0 where either is constant."""
    x, y = (np.asarray(each, float) - np.mean(each, dtype=float) for each in (labels, found))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale else 0.0


def spearman(labels: np.ndarray, found: np.ndarray) -> float:
    """Returns the linear correlation of ranks, equal numbers sharing the mean of theirs."""
    return pearson(_ranks(labels), _ranks(found))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}

_USUAL: Mapping[ProblemType, tuple[str, ...]] = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
}


def usual_metrics(head: HeadConfig) -> tuple[str, ...]:
    """Returns what is reported of a classifier, first what its best epoch is chosen by."""
    return _USUAL[head.problem_type]


def predictions(logits: np.ndarray, head: HeadConfig) -> np.ndarray:
    """Returns what logits, float32 [N, C], say: a label, ones and zeros, or a number, of each."""
    if head.problem_type == "regression":
        return logits[:, 0]
    if head.problem_type == "multi_label_classification":
        return (logits > 0).astype(int)
    return logits.argmax(axis=1)


def measure(
    names: tuple[str, ...], labels: np.ndarray, logits: np.ndarray, head: HeadConfig
) -> dict[str, Any]:
    """Returns metrics by name, of labels as in a data set and of logits."""
    found = predictions(logits, head)
    return {name: METRICS[name](labels, found) for name in names}
