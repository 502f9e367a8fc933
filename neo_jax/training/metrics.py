"""How well labels are predicted, as numbers from 0 to 1 or -1 to 1.

What GLUE and SuperGLUE report is a function of labels and of predictions, arrays of whole numbers,
or of numbers for the correlations; they equal scikit-learn's and scipy's. Words have such labels
too, and the F1 of entities, as CoNLL-2003's script conlleval and seqeval count them. SQuAD's exact
match and F1 (Rajpurkar et al., "SQuAD", 2016, its evaluation script) compare words of answers in
lower case, without punctuation and articles.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
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


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities of a text: what each is, and its first and its last word.

    Tags are as B-PER, I-PER and O; B begins an entity, and so does I behind another tag.
    """
    found: list[tuple[str, int, int]] = []
    for i, tag in enumerate(tags):
        mark, _, kind = tag.partition("-")
        if mark != "O":
            goes_on = mark == "I" and found and found[-1][2] == i - 1 and found[-1][0] == kind
            if goes_on:
                found[-1] = (kind, found[-1][1], i)
            else:
                found.append((kind, i, i))
    return set(found)


def entity_f1(labels: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> float:
    """Returns 2 PR / (P + R) of the entities of all texts, of which tags are given for each."""
    right, said = (
        {(i, *entity) for i, tags in enumerate(texts) for entity in entities(tags)}
        for texts in (labels, found)
    )
    return 2 * len(right & said) / (len(right) + len(said)) if right or said else 0.0


def squad_words(text: str) -> list[str]:
    """Returns the words of an answer, as SQuAD's evaluation script compares them."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_em(answer: str, reference: str) -> float:
    """Returns 1 for an answer of the same words, else 0."""
    return float(squad_words(answer) == squad_words(reference))


def squad_f1(answer: str, reference: str) -> float:
    """Returns 2 PR / (P + R) of the words of an answer."""
    found, right = squad_words(answer), squad_words(reference)
    common = sum((collections.Counter(found) & collections.Counter(right)).values())
    return 2 * common / (len(found) + len(right)) if common else 0.0


_ANSWERS = {"squad_f1": squad_f1, "squad_em": squad_em}
_WORDS = ("accuracy", "macro_f1", "entity_f1")
_USUAL: Mapping[ProblemType, tuple[str, ...]] = {
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("f1", "accuracy"),
    "regression": ("pearson", "spearman"),
}


def known_metrics(head: HeadConfig) -> tuple[str, ...]:
    """Returns the metrics that there are of what a head says."""
    return {"classifier": _WORDS, "qa_outputs": tuple(_ANSWERS)}.get(head.kind, tuple(METRICS))


def usual_metrics(head: HeadConfig) -> tuple[str, ...]:
    """Returns what is reported of a head, first what its best epoch is chosen by."""
    if head.kind == "qa_outputs":
        return tuple(_ANSWERS)
    if head.kind == "classifier":
        has_entities = any(label.startswith("B-") for label in head.labels)
        return ("entity_f1", "accuracy") if has_entities else ("accuracy", "macro_f1")
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


def measure_words(
    names: Sequence[str], texts: Sequence[tuple[np.ndarray, np.ndarray]], head: HeadConfig
) -> dict[str, float]:
    """Returns metrics by name, of texts: the labels of the words of each, and those predicted."""
    labels, found = zip(*texts, strict=True)
    scores = {}
    for name in names:
        if name == "entity_f1":
            tags = [[[head.labels[i] for i in text] for text in each] for each in (labels, found)]
            scores[name] = entity_f1(*tags)
        else:
            scores[name] = METRICS[name](np.concatenate(labels), np.concatenate(found))
    return scores


def measure_answers(
    names: Sequence[str], references: Sequence[Sequence[str]], found: Sequence[str]
) -> dict[str, float]:
    """Returns metrics by name, of answers, each next to the nearest of those that are right.

    As SQuAD 2.0's script has it, no answer, "", is right where that is the reference.
    """

    def value(name: str, answer: str, reference: str) -> float:
        return _ANSWERS[name](answer, reference) if reference else float(not squad_words(answer))

    scores = {}
    for name in names:
        pairs = zip(found, references, strict=True)
        scores[name] = float(np.mean([max(value(name, a, r) for r in rs) for a, rs in pairs]))
    return scores
