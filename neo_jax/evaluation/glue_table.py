"""Results of GLUE and SuperGLUE: for people, for programs, as a picture."""

from collections.abc import Sequence
from typing import Any

from neo_jax.evaluation.glue import TaskResult
from neo_jax.evaluation.glue_tasks import TASKS
from neo_jax.files.figure import FAINT, INK, as_png, legend_below, name_rows, new_figure

PUBLISHED = {
    "cola": 76.8,
    "mnli": 82.1,
    "mrpc": 80.4,
    "qnli": 88.3,
    "qqp": 89.6,
    "rte": 65.3,
    "sst2": 91.2,
}
"""Accuracies in % of GPT-2, 124M, on development sets."""

SOURCE = "GPT-2 124M fine-tuned for 3 epochs at 5e-5, tanganke/gpt2_* on the Hugging Face hub"

_NAMES = {"f1": "F1", "macro_f1": "macro F1", "matthews": "Matthews", "exact_match": "exact match"}
_OURS = "#d9480f"


def entries(results: Sequence[TaskResult]) -> list[dict[str, Any]]:
    """Returns a dictionary for each metric of each task, in %."""
    rows = []
    for result in results:
        for metric in result.scores[0]:
            deviation = result.deviation(metric)
            published = PUBLISHED.get(result.task) if metric == "accuracy" else None
            mean = 100 * result.mean(metric)
            rows.append(
                {
                    "task": result.task,
                    "title": TASKS[result.task].title,
                    "metric": metric,
                    "is_official": metric in TASKS[result.task].metrics,
                    "train": result.num_train,
                    "dev": result.num_dev,
                    "is_divided": result.is_divided,
                    "seeds": [100 * each[metric] for each in result.scores],
                    "mean": mean,
                    "sd": None if deviation is None else 100 * deviation,
                    "published": published,
                    "difference": None if published is None else mean - published,
                }
            )
    return rows


def average(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the benchmark's score: the mean over tasks of the mean of their official metrics."""
    tasks: dict[str, list[float]] = {}
    for row in rows:
        if row["is_official"]:
            tasks.setdefault(row["task"], []).append(row["mean"])
    means = [sum(values) / len(values) for values in tasks.values()]
    return sum(means) / len(means)


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Returns cells of text, the head first."""
    cells = [["", "metric", "train", "dev", "seeds", "mean", "sd", "GPT-2", "difference"]]
    for row in rows:
        numbers = [_number(row[name]) for name in ("mean", "sd", "published")]
        counts = [row["train"] or "-", row["dev"], len(row["seeds"])]
        name = _NAMES.get(row["metric"], row["metric"])
        difference = _number(row["difference"], "+")
        cells.append([row["title"], name, *map(str, counts), *numbers, difference])
    return cells


def footer(rows: Sequence[dict[str, Any]]) -> str:
    """Returns what the columns are, and the mean of all tasks."""
    lines = [f"mean of tasks {average(rows):.2f}; % on the development sets; GPT-2: {SOURCE}"]
    divided = sorted({row["title"] for row in rows if row["is_divided"]})
    if divided:
        lines.append(
            f"{', '.join(divided)}: one set is here, of which 30 % are held out and the rest is "
            "trained on; not to be compared with the published figure"
        )
    return "\n".join(lines)


def _number(number: float | None, sign: str = "") -> str:
    return "-" if number is None else f"{number:{sign}.2f}"


def draw(rows: Sequence[dict[str, Any]], model: str) -> bytes:
    """Returns a PNG: of each metric all seeds, their mean, and the published figure."""
    figure = new_figure(9, 1.6 + 0.42 * len(rows), dpi=120)
    axes = figure.add_subplot()
    axes.set_title(f"{model}: % on the development sets", loc="left", fontsize=11, color=INK)
    labels = [f"{row['title']}, {_NAMES.get(row['metric'], row['metric'])}" for row in rows]
    for y, row in enumerate(rows):
        axes.axhline(y, color="#ececec", linewidth=1, zorder=0)
        axes.scatter(row["seeds"], [y] * len(row["seeds"]), s=28, color=_OURS, alpha=0.45,
                     linewidth=0, label="a seed")  # fmt: skip
        axes.scatter([row["mean"]], [y], s=150, marker="|", color=_OURS, linewidth=2.2,
                     label="their mean")  # fmt: skip
        published = float("nan") if row["published"] is None else row["published"]
        axes.scatter([published], [y], s=60, marker="D", facecolor="none", edgecolor=FAINT,
                     label="GPT-2, published")  # fmt: skip
        text = _number(row["mean"]) + ("" if row["sd"] is None else f" ± {row['sd']:.2f}")
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center",
                      fontsize=9, color=_OURS, annotation_clip=False)  # fmt: skip
    name_rows(axes, labels)
    lowest = min(min(row["seeds"]) for row in rows)
    axes.set_xlim(min(0, lowest) - 1, 100)
    legend_below(figure, axes, ncols=3, fontsize=9)
    return as_png(figure)
