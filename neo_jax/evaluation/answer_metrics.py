"""How near answers come to those that are right: the measures that tasks are known by.

ROUGE-L is google-research's (Lin, "ROUGE", 2004) without a stemmer, the F measure of the longest
common subsequence of words, as `rouge-score` computes it; chrF is `sacrebleu`'s (Popović, 2015), of
all answers together. SQuAD's exact match and F1 are `neo_jax.training.metrics`'.
"""

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np

from neo_jax.errors import NeoError, suggest
from neo_jax.training.metrics import squad_em, squad_f1

_PACKAGES = {"rouge_l": "rouge_score", "chrf": "sacrebleu"}


def measure_answers(
    metric: str, answers: Sequence[str], references: Sequence[str]
) -> tuple[float, float | None]:
    """Returns a metric in %, and its standard error, None of what is no mean over examples.

    Args:
      metric: a name of `METRICS`.
      answers: texts; spaces around them do not count.
      references: the right answer to each.
    """
    pairs = [(a.strip(), r.strip()) for a, r in zip(answers, references, strict=True)]
    if metric == "chrf":
        return _chrf(pairs), None
    values = 100 * np.array([METRICS[metric](*pair) for pair in pairs])
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(values.mean()), error


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises `NeoError` where a metric is unknown or the package that it needs is not there."""
    for name in metrics:
        if name not in METRICS:
            raise NeoError(f"no metric is called '{name}'.{suggest(name, METRICS)}")
        package = _PACKAGES.get(name)
        if package and importlib.util.find_spec(package) is None:
            raise NeoError(f"{name} needs {package}; pip install 'neo_jax[recipes]'.")


def _exact_match(answer: str, reference: str) -> float:
    """Character for character, as `evaluate`'s exact_match."""
    return float(answer == reference)


def _rouge_l(answer: str, reference: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure)


def _chrf(pairs: Sequence[tuple[str, str]]) -> float:
    from sacrebleu import corpus_chrf

    answers, references = zip(*pairs, strict=True)
    return float(corpus_chrf(list(answers), [list(references)]).score)


METRICS: dict[str, Callable[[str, str], float]] = {
    "rouge_l": _rouge_l,
    "chrf": lambda answer, reference: _chrf([(answer, reference)]),
    "exact_match": _exact_match,
    "squad_em": squad_em,
    "squad_f1": squad_f1,
}
"""What each metric gives an answer, from 0 to 1, and chrF from 0 to 100."""
