"""A model's results next to the published ones: for people, for programs, as a picture."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from neo_jax.evaluation.reference_results import BENCHMARKS, MEASURES, PUBLISHED, SOURCE, Measure
from neo_jax.files.figure import FAINT, INK, as_png, legend_below, name_rows, new_figure

_NAMES = {
    "gpt-neo-125m": "GPT-Neo 125M",
    "gpt-neo-1.3b": "GPT-Neo 1.3B",
    "gpt2-xl": "GPT-2 1.5B",
    "gpt-neo-2.7b": "GPT-Neo 2.7B",
}
_COLORS = {
    "gpt-neo-125m": "#9ecae1",
    "gpt-neo-1.3b": "#4a97c9",
    "gpt2-xl": "#b5b5b5",
    "gpt-neo-2.7b": "#08519c",
}
_OURS = "#d9480f"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A measure of a model, next to the published one; accuracies in %."""

    measure: Measure
    examples: int = 0  # 0 where it was not measured
    value: float | None = None
    error: float | None = None  # the standard error, which perplexities of texts have not
    published: float | None = None

    @property
    def difference(self) -> float | None:
        """How much more than published."""
        if self.value is None or self.published is None:
            return None
        return self.value - self.published


def rows(results: Mapping[str, Any], published: str) -> list[Entry]:
    """Returns all measures of the harness's results, next to the published ones of a model."""
    numbers = PUBLISHED.get(published, (None,) * len(MEASURES))
    found = []
    for measure, number in zip(MEASURES, numbers, strict=True):
        task = BENCHMARKS[measure.benchmark].task
        row = Entry(measure, published=number)
        if values := results["results"].get(task):
            scale = 100 if measure.is_accuracy else 1
            error = values.get(f"{measure.metric}_stderr,none")
            row = dataclasses.replace(
                row,
                examples=results["n-samples"][task]["effective"],
                value=scale * values[f"{measure.metric},none"],
                error=scale * error if isinstance(error, float) else None,
            )
        found.append(row)
    return found


def describe(card: Sequence[Entry], published: str, left_out: Mapping[str, str]) -> dict[str, Any]:
    """Returns a card as fields for JSON, and why some benchmarks are left out."""
    return {
        "published": _NAMES.get(published),
        "source": SOURCE,
        "rows": [
            {
                "benchmark": BENCHMARKS[row.measure.benchmark].title,
                "task": BENCHMARKS[row.measure.benchmark].task,
                "unit": row.measure.unit,
                "examples": row.examples,
                "value": row.value,
                "stderr": row.error,
                "published": row.published,
                "difference": row.difference,
            }
            for row in card
        ],
        "left_out": dict(left_out),
    }


def table(card: Sequence[Entry], published: str) -> list[list[str]]:
    """Returns a card as cells of text, the head first; what was not measured is left out."""
    head = ["", "unit", "examples", "here", "±", "published", "difference"]
    cells = [
        [
            BENCHMARKS[row.measure.benchmark].title,
            row.measure.unit,
            str(row.examples),
            _number(row.value, row.measure),
            _number(row.error, row.measure),
            _number(row.published, row.measure),
            _number(row.difference, row.measure, "+"),
        ]
        for row in card
        if row.value is not None
    ]
    return [head, *cells] if published else [line[:5] for line in [head, *cells]]


def footer(published: str) -> str:
    """Returns in one line what the published column is."""
    if not published:
        sizes = ", ".join(_NAMES.values())
        return f"no results are published of a model of this shape, but of {sizes}"
    return f"published: {_NAMES[published]}, {SOURCE}; without examples before a question"


def _number(number: float | None, measure: Measure, sign: str = "") -> str:
    if number is None:
        return "-"
    digits = {"acc": 2, "bits_per_byte": 4}.get(measure.metric, 3 if abs(number) < 1000 else 0)
    return f"{number:{sign},.{digits}f}"


def draw(card: Sequence[Entry], published: str, model: str) -> bytes:
    """Returns a PNG: of each measure the model's value, among those of all published models."""
    measured = [(i, row) for i, row in enumerate(card) if row.value is not None]
    parts = [
        [(i, row) for i, row in measured if row.measure.is_accuracy is accuracy]
        for accuracy in (True, False)
    ]
    parts = [part for part in parts if part]
    heights = [len(part) + 1.0 for part in parts]
    figure = new_figure(9.5, 1.6 + 0.5 * sum(heights), dpi=120)
    figure.get_layout_engine().set(h_pad=0.12, hspace=0.06)
    figure.suptitle(model, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    panels = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
    for axes, part in zip(panels, parts, strict=True):
        _draw_part(axes, part, published)
    legend_below(figure, panels[0], ncols=6, fontsize=9, handletextpad=0.2, columnspacing=1.4)
    return as_png(figure)


def _draw_part(axes: Any, part: Sequence[tuple[int, Entry]], published: str) -> None:
    """Accuracies, or what is less where the model is better: a line for each measure."""
    accuracy = part[0][1].measure.is_accuracy
    for y, (i, row) in enumerate(part):
        axes.axhline(y, color="#ececec", linewidth=1, zorder=0)
        for name, numbers in PUBLISHED.items():
            # What is not published is drawn nowhere, but named in the legend.
            x, mine = numbers[i], name == published
            axes.scatter(
                [float("nan") if x is None else x], [y], s=75, color=_COLORS[name],
                edgecolor=INK if mine else "white", linewidth=0.9, zorder=4 if mine else 3,
                label=_NAMES[name],
            )  # fmt: skip
        if row.measure.chance:
            axes.scatter([row.measure.chance], [y], s=260, marker="|", color=FAINT,
                         linewidth=1.3, zorder=1, label="chance")  # fmt: skip
        if row.difference is not None:
            axes.plot([row.published, row.value], [y, y], color=_OURS, linewidth=2.2, zorder=2)
        axes.scatter([row.value], [y], s=105, marker="D", facecolor="none", edgecolor=_OURS,
                     linewidth=2.2, zorder=5, clip_on=False, label="this model")  # fmt: skip
        text = _number(row.value, row.measure)
        if row.difference is not None:
            text += f"  ({_number(row.difference, row.measure, '+')})"
        axes.annotate(text, (1.015, y), xycoords=("axes fraction", "data"), va="center",
                      fontsize=10, color=_OURS, annotation_clip=False)  # fmt: skip
    head = f"here (less {_NAMES[published]})" if published else "here"
    axes.annotate(head, (1.015, 1), xycoords="axes fraction", xytext=(0, 6),
                  textcoords="offset points", fontsize=10, color=FAINT)  # fmt: skip
    names = [BENCHMARKS[row.measure.benchmark].title for _, row in part]
    if not accuracy:
        names = [f"{n}, {row.measure.unit}" for n, (_, row) in zip(names, part, strict=True)]
    name_rows(axes, names, size=10.5, numbers=9)
    axes.set_title("accuracy, %: more is better" if accuracy else "less is better", loc="left",
                   fontsize=10, color=FAINT)  # fmt: skip
    if accuracy:
        axes.set_xlim(0, 100)
    else:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.6g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(x=0.06)
