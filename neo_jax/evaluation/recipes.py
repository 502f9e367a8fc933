"""A recipe: examples of prompts and answers around a run of training, and what it reaches.

Its folder is the run's, with train.jsonl and test.jsonl, where examples are made, data/ of
`prepare`, for each model that was asked answers-STEP.jsonl, and results.json and results.png.
"""

import collections
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from neo_jax.data.prepare import prepare
from neo_jax.data.sources import find_sources, json_lines
from neo_jax.data.writer import DATASET_FILE
from neo_jax.devices.processes import barrier, is_leader
from neo_jax.errors import NeoError, brief
from neo_jax.evaluation.answer_metrics import check_metrics, measure_answers
from neo_jax.evaluation.made_examples import Row, make_rows
from neo_jax.fields import check, number
from neo_jax.files.compression import unpacked_name
from neo_jax.files.figure import INK, as_png, legend_below, name_rows, new_figure
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import check_writable, make_path, write_whole
from neo_jax.training.config import TrainConfig

_MOST = 20_000  # examples among which the nearest is searched
_RECIPE_FILE = "recipe.json"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is learned, and how answers are judged. A config in `configs/` may have one."""

    task: Literal["summaries", "translation", "questions", "instructions"]
    metrics: tuple[str, ...]  # rouge_l, chrf, exact_match, squad_em, squad_f1; the first is drawn
    # Files of {"prompt", "completion"} lines to learn, and others to judge by, in the place of
    # examples that are made by rules.
    examples: tuple[str, ...] = ()
    test_examples: tuple[str, ...] = ()
    num_examples: int = number(4000, least=1)  # made to learn
    num_tests: int = number(200, least=1)  # to judge by: made, or of the files the first ones
    held_out: float = number(0.02, least=0, below=1)  # share of the examples, for the loss
    max_new_tokens: int = number(64, least=1)  # of an answer

    def __post_init__(self) -> None:
        check(self)
        if bool(self.examples) != bool(self.test_examples):
            raise NeoError("give both --examples and --test-examples, or neither.")
        check_metrics(self.metrics)
        if not self.metrics:
            raise NeoError("name a metric to judge answers by, such as rouge_l.")


def prepare_examples(recipe: Recipe, config: TrainConfig, folder: Path) -> list[Row]:
    """Makes what the run learns from, unless it is there; returns the examples to judge by.

    Args:
      recipe: what is learned.
      config: of the run.
      folder: of the run.

    Raises:
      NeoError: files that hold no pairs, a folder of another recipe, or one that cannot be written.
    """
    if is_leader():
        check_writable(folder)
        _check_same(recipe, config, folder)
        files = _made(recipe, folder)
        for some in files:  # what is no pair is known before anything is prepared
            next(_read(some), None)
        if not (folder / "data" / DATASET_FILE).is_file():
            tokenizer = config.pretrained or "bundled"
            prepare(files[0], folder / "data", tokenizer, held_out=recipe.held_out)
    barrier("prepared")
    return [*itertools.islice(_read(_made(recipe, folder)[1]), recipe.num_tests)]


def _check_same(recipe: Recipe, config: TrainConfig, folder: Path) -> None:
    """Keeps what decides the examples and the questions next to them."""
    now = {**dataclasses.asdict(recipe), "pretrained": config.pretrained}
    now = json.loads(json.dumps({name: x for name, x in now.items() if name != "metrics"}))
    path = folder / _RECIPE_FILE
    before = read_json(path) if path.is_file() else now
    for name in now:
        if before.get(name) != now[name]:
            raise NeoError(
                f"{folder} is of another recipe: {name} was {brief(before.get(name))}, and is "
                f"{brief(now[name])}; name another --output, or remove that folder."
            )
    write_whole(path, json.dumps(now, indent=1) + "\n")


def _made(recipe: Recipe, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the files to learn from and to judge by, which are written where none are given."""
    if recipe.examples:
        return recipe.examples, recipe.test_examples
    paths = [folder / "train.jsonl", folder / "test.jsonl"]
    if not paths[0].is_file():
        tests = make_rows(recipe.task, recipe.num_tests, seed=1)
        rows = make_rows(recipe.task, recipe.num_examples, seed=0, without=tests)
        for path, some in ((paths[1], tests), (paths[0], rows)):
            lines = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in some)
            write_whole(path, "".join(lines))
    return (str(paths[0]),), (str(paths[1]),)


def _read(files: Sequence[str]) -> Iterator[Row]:
    """Yields the pairs of files, whose lines may say of which "kind" they are."""
    for source in find_sources(files):
        if not unpacked_name(source.name).endswith(".jsonl"):
            raise NeoError(f"{source.name} holds no pairs; name .jsonl files.")
        for where, fields in json_lines(make_path(source.name)):
            prompt, completion = fields.get("prompt"), fields.get("completion")
            if not (isinstance(prompt, str) and isinstance(completion, str) and completion.strip()):
                raise NeoError(f'{where}: every line is {{"prompt": "...", "completion": "..."}}.')
            yield Row(prompt, completion, str(fields.get("kind", "")))


def nearest_answers(recipe: Recipe, folder: Path, tests: Sequence[Row]) -> list[str]:
    """Returns for each prompt the answer to the one that is likest, of the first ones to learn.

    Prompts are alike by the words that they share, rare ones more (their log inverse document
    frequency), over the root of how many a prompt has. What answers are worth that a model could
    give by heart is seen by this.
    """
    rows = [*itertools.islice(_read(_made(recipe, folder)[0]), _MOST)]
    places: dict[str, list[int]] = collections.defaultdict(list)
    sizes = np.ones(len(rows))
    for i, row in enumerate(rows):
        words = set(row.prompt.split())
        sizes[i] = len(words)
        for word in words:
            places[word].append(i)
    answers = []
    for test in tests:
        shared = np.zeros(len(rows))
        for word in set(test.prompt.split()) & places.keys():
            shared[places[word]] += math.log(len(rows) / len(places[word]))
        answers.append(rows[int(np.argmax(shared / np.sqrt(sizes)))].completion)
    return answers


@dataclasses.dataclass(frozen=True)
class Score:
    """What answers are worth by a metric, in %, each with its standard error or None."""

    metric: str
    kind: str  # of questions; "" is all of them
    examples: int
    values: Mapping[str, tuple[float, float | None]]  # by who answers, see `ANSWERERS`


ANSWERERS = {
    "nearest": "the answer to the likest prompt that was learned",
    "before": "the model before it is trained",
    "after": "the model as it is trained",
}
"""Who answers the questions."""


def scores(
    recipe: Recipe, tests: Sequence[Row], answers: Mapping[str, Sequence[str]]
) -> list[Score]:
    """Returns all metrics over all questions, then the first metric over those of each kind."""
    kinds = sorted({row.kind for row in tests})
    wanted = [(metric, "") for metric in recipe.metrics]
    wanted += [(recipe.metrics[0], kind) for kind in kinds if len(kinds) > 1]
    found = []
    for metric, kind in wanted:
        places = [i for i, row in enumerate(tests) if kind in ("", row.kind)]
        right = [tests[i].completion for i in places]
        values = {
            who: measure_answers(metric, [texts[i] for i in places], right)
            for who, texts in answers.items()
        }
        found.append(Score(metric, kind, len(places), values))
    return found


def table(found: Sequence[Score]) -> list[list[str]]:
    """Returns cells of text, the head first; errors are those of the trained model."""
    answerers = [*found[0].values]
    rows = [["", "metric", "examples", *answerers, "±"]]
    for score in found:
        cells = [f"{value:.1f}" for value, _ in score.values.values()]
        error = score.values["after"][1]
        cells.append("-" if error is None else f"{error:.1f}")
        rows.append([score.kind or "all", NAMES[score.metric], str(score.examples), *cells])
    return rows


NAMES = {
    "rouge_l": "ROUGE-L",
    "chrf": "chrF",
    "exact_match": "exact match",
    "squad_em": "SQuAD exact match",
    "squad_f1": "SQuAD F1",
}
"""Metrics as people write them."""

_COLORS = {"nearest": "#b5b5b5", "before": "#4a97c9", "after": "#d9480f"}


def draw(found: Sequence[Score], title: str) -> bytes:
    """Returns a PNG: of each metric and each kind who answers how well, in %."""
    figure = new_figure(8.5, 1.7 + 0.42 * len(found), dpi=120)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    for y, score in enumerate(found):
        axes.axhline(y, color="#ececec", linewidth=1, zorder=0)
        for who, (value, error) in score.values.items():
            axes.errorbar([value], [y], xerr=[[error or 0], [error or 0]], fmt="o", markersize=8,
                          color=_COLORS[who], label=ANSWERERS[who])  # fmt: skip
        axes.annotate(f"{score.values['after'][0]:.1f}", (1.015, y), fontsize=9.5, va="center",
                      xycoords=("axes fraction", "data"), color=_COLORS["after"],
                      annotation_clip=False)  # fmt: skip
    labels = [score.kind or NAMES[score.metric] for score in found]
    name_rows(axes, labels)
    axes.set_xlim(-2, 102)
    legend_below(figure, axes, ncols=3, fontsize=8.5)
    return as_png(figure)
