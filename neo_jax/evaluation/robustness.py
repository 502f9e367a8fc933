"""How much worse a model does on texts with noise, and on tasks whose contexts have noise.

Of texts every token is read and predicted with its noise; what it takes is counted over the bytes
and words of the text without. Of tasks the contexts have noise, examples before the question
included; what is to follow, of which the answer is made, has none.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from neo_jax.devices.processes import say
from neo_jax.evaluation.noise import Noise, NoiseOptions, perturb
from neo_jax.evaluation.texts import Document, Total, measure
from neo_jax.files.figure import FAINT, INK, as_png, new_figure
from neo_jax.text.language_model import LanguageModel

Values = Mapping[str, tuple[float, float | None]]
"""By name a measure, and its standard error where it has one."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """A measure by how much noise there is."""

    noise: Noise
    measure: str
    values: tuple[float, ...]  # one a rate
    errors: tuple[float | None, ...]  # their standard errors


def curves(options: NoiseOptions, evaluate: Callable[[Noise, float], Values]) -> list[Curve]:
    """Evaluates at every rate of every kind of noise, and without noise once.

    Args:
      options: which noise, and how much.
      evaluate: measures a model at a rate of a noise.
    """
    found: list[Curve] = []
    plain: Values = {}
    for noise in options.perturb:
        points = []
        for rate in options.rates:
            if rate or not plain:
                say(f"{noise}, rate {rate:g}" if rate else "without noise")
                values = evaluate(noise, rate)
                plain = plain if rate else values
            points.append(values if rate else plain)
        for name in points[0]:
            numbers, errors = zip(*(point[name] for point in points), strict=True)
            found.append(Curve(noise, name, numbers, errors))
    return found


def measure_texts(
    lm: LanguageModel,
    documents: Iterable[Document],
    noise: Noise,
    rate: float,
    seed: int,
    stride: int = 0,
    batch_size: int = 0,
) -> dict[str, tuple[float, None]]:
    """Returns bits a byte and perplexity a word of documents with noise, by the name of each."""
    total = Total()
    for _, one in measure(lm, with_noise(documents, noise, rate, seed), stride, batch_size):
        total.add(one)
    return {"bits/byte": (total.bits_per_byte, None), "ppl/word": (total.word_perplexity, None)}


def with_noise(
    documents: Iterable[Document], noise: Noise, rate: float, seed: int
) -> Iterator[Document]:
    """Yields documents with noise, which count as many words and bytes as without."""
    for document in documents:
        yield document._replace(text=perturb(document.text, noise, rate, seed))


def describe(found: Sequence[Curve], options: NoiseOptions) -> dict[str, Any]:
    """Returns curves as fields for JSON."""
    rows = [dataclasses.asdict(curve) for curve in found]
    return {"rates": [*options.rates], "noise_seed": options.noise_seed, "curves": rows}


def table(found: Sequence[Curve], options: NoiseOptions) -> list[list[str]]:
    """Returns cells of text, the head first: a row a curve, a column a rate."""
    head = ["", *(f"{rate:g}" for rate in options.rates)]
    rows = [
        [f"{c.measure}, {c.noise}", *(f"{value:.4g}" for value in c.values)]
        for c in sorted(found, key=lambda curve: curve.measure)
    ]
    return [head, *rows]


_COLORS = {"typos": "#d9480f", "homoglyphs": "#08519c", "case": "#4a97c9", "spaces": "#6a8a2a"}


def draw(found: Sequence[Curve], options: NoiseOptions, title: str) -> bytes:
    """Returns a PNG: of each measure a panel, in it a line for each kind of noise."""
    names = [*dict.fromkeys(curve.measure for curve in found)]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = new_figure(1.2 + 3.6 * columns, 0.9 + 2.9 * lines, title, dpi=120)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for curve in (curve for curve in found if curve.measure == name):
            color = _COLORS[curve.noise]
            axes.errorbar(
                options.rates, curve.values, yerr=[error or 0 for error in curve.errors],
                marker="o", markersize=4, linewidth=1.8, capsize=2, color=color, label=curve.noise,
            )  # fmt: skip
        if max(max(c.values) / max(min(c.values), 1e-9) for c in found if c.measure == name) > 50:
            axes.set_yscale("log")
        axes.set_title(name, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("rate of noise", fontsize=9, color=FAINT)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(color=FAINT, labelcolor=FAINT, labelsize=8.5)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    return as_png(figure)
