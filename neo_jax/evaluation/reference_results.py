"""The published results of GPT-Neo, and what they are called in lm-evaluation-harness.

The numbers are those of the tables in the README of github.com/EleutherAI/gpt-neo.
"""

import dataclasses
from collections.abc import Mapping

from neo_jax.config import ModelConfig, find_preset

SOURCE = "README of github.com/EleutherAI/gpt-neo"


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One of the benchmarks: its task in the harness, and what a line of its data holds."""

    title: str
    task: str
    fields: tuple[str, ...]


BENCHMARKS: Mapping[str, Benchmark] = {
    "pile": Benchmark("The Pile", "pile", ("text",)),
    "wikitext": Benchmark("WikiText", "wikitext", ("page",)),
    "lambada": Benchmark("LAMBADA", "lambada_openai", ("text",)),
    "winogrande": Benchmark(
        "WinoGrande", "winogrande", ("sentence", "option1", "option2", "answer")
    ),
    "hellaswag": Benchmark(
        "HellaSwag", "hellaswag", ("activity_label", "ctx_a", "ctx_b", "endings", "label")
    ),
    "mathqa": Benchmark("MathQA", "mathqa", ("Problem", "options", "correct")),
    "pubmedqa": Benchmark("PubMedQA", "pubmedqa", ("QUESTION", "CONTEXTS", "final_decision")),
    "piqa": Benchmark("PIQA", "piqa", ("goal", "sol1", "sol2", "label")),
}
"""By the name that --data gives them. The Pile is in no task of the harness that can be had."""


@dataclasses.dataclass(frozen=True)
class Measure:
    """A column of the published tables: a metric of a benchmark."""

    benchmark: str
    metric: str  # the harness's name
    unit: str  # accuracies are in %
    chance: float = 0.0  # of an accuracy, in %: choosing blindly

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better."""
        return self.metric == "acc"


MEASURES = (
    Measure("pile", "bits_per_byte", "bits/byte"),
    Measure("wikitext", "word_perplexity", "ppl/word"),
    Measure("lambada", "perplexity", "ppl"),
    Measure("lambada", "acc", "acc, %"),
    Measure("winogrande", "acc", "acc, %", 50),
    Measure("hellaswag", "acc", "acc, %", 25),
    Measure("mathqa", "acc", "acc, %", 20),
    Measure("pubmedqa", "acc", "acc, %", 100 / 3),
    Measure("piqa", "acc", "acc, %", 50),
)

PUBLISHED: Mapping[str, tuple[float | None, ...]] = {
    "gpt-neo-125m": (None, 32.285, 30.266, 37.36, 50.43, 28.67, 22.78, 55.10, 63.06),
    "gpt-neo-1.3b": (0.7527, 13.10, 7.498, 57.23, 55.01, 38.66, 24.05, 54.40, 71.11),
    "gpt2-xl": (1.0468, 17.48, 10.634, 51.21, 59.40, 40.03, 23.64, 58.33, 70.78),
    "gpt-neo-2.7b": (0.7165, 11.39, 5.626, 62.22, 56.50, 42.73, 24.72, 57.54, 72.14),
}
"""By the name of a preset: a number for each of `MEASURES`, where there is one."""


def find_published(config: ModelConfig) -> str:
    """Returns the name in `PUBLISHED` of the model that has a shape, or ""."""
    name = find_preset(config)
    return name if name in PUBLISHED else ""
