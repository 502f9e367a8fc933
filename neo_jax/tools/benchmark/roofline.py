"""The picture of a benchmark, a roofline (Williams, Waterman and Patterson, 2009)."""

from typing import Any

import jax.numpy as jnp

from neo_jax.files.figure import as_png, new_figure
from neo_jax.tools.benchmark.report import rate_text
from neo_jax.tools.benchmark.run import Result

_COLORS = {"prefill": "#0b6e99", "decode": "#c8553d", "train": "#5b8c3a"}
_MARKERS = {"prefill": "o", "decode": "s", "train": "^"}
_INK, _FAINT = "#222222", "#9a9a9a"


def draw(result: Result) -> bytes:
    """Returns a PNG: steps as points below the limits that were measured of the devices.

    From left to right a step does more products with each byte that it must move: under the slope
    memory holds it up, under the level line the products do.
    """
    steps = [step for step in result.measurements if not step.note]
    rates, bandwidth = result.limits.products, result.limits.bandwidth
    left = min([step.intensity for step in steps] + [1.0]) / 4
    right = max([step.intensity for step in steps] + [max(rates.values()) / bandwidth]) * 8
    bottom = min([step.flops_per_second for step in steps] + [left * bandwidth]) / 2
    figure = new_figure(10, 6, dpi=120)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, 4 * max(rates.values())))
    _draw_roofs(axes, result, left, right)
    for kind, color in _COLORS.items():
        points = [(step.intensity, step.flops_per_second) for step in steps if step.kind == kind]
        if points:
            across, up = zip(*points, strict=True)
            style: dict[str, Any] = {"color": color, "marker": _MARKERS[kind], "zorder": 4}
            axes.scatter(across, up, s=55, label=kind, edgecolor="white", **style)
    figure.draw_without_rendering()
    _draw_labels(axes, [(s.intensity, s.flops_per_second, s) for s in steps])
    setup = result.setup
    where = f"{len(setup.devices)} x {setup.devices[0].device_kind}"
    dtype = jnp.dtype(setup.model.dtype).name
    axes.set_title(f"{setup.name}, {dtype}, {where}", loc="left", fontsize=12, color=_INK)
    axes.set(xlabel="FLOPs for each byte that must move", ylabel="FLOP/s")
    axes.grid(which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color=_FAINT, labelcolor=_INK)
    if steps:
        axes.legend(frameon=False, loc="lower right", title="batch × length", title_fontsize=9)
    return as_png(figure)


def _draw_roofs(axes: Any, result: Result, left: float, right: float) -> None:
    bandwidth = result.limits.bandwidth
    own = jnp.dtype(result.setup.model.dtype).name
    for dtype, rate in result.limits.products.items():
        color, width = (_INK, 2.0) if dtype == own else (_FAINT, 1.2)
        ridge = rate / bandwidth
        axes.plot([ridge, right], [rate, rate], color=color, linewidth=width, zorder=2)
        text = f"products in {dtype}: {rate_text(rate, 'FLOP/s')}"
        place = {"ha": "right", "va": "bottom", "textcoords": "offset points"}
        axes.annotate(text, (right, rate), (-4, 4), color=color, fontsize=9, **place)
    ridge = max(result.limits.products.values()) / bandwidth
    slope = [left * bandwidth, ridge * bandwidth]
    axes.plot([left, ridge], slope, color=_INK, linewidth=2, zorder=2)
    axes.annotate(
        f"reading memory: {rate_text(bandwidth, 'B/s')}",
        (left * 1.2, left * 1.2 * bandwidth),
        (-2, 8),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        color=_INK,
        fontsize=9,
    )


def _draw_labels(axes: Any, points: list[Any]) -> None:
    """Writes next to each point what it is; from the top on, none over another."""
    height, width = 15, 62  # of a label, in pixels
    taken: list[tuple[float, float]] = []
    for x, y, step in sorted(points, key=lambda point: -point[1]):
        across, up = axes.transData.transform((x, y))
        place = up
        while any(abs(place - b) < height and abs(across - a) < width for a, b in taken):
            place -= 1
        taken.append((across, place))
        axes.annotate(
            f"{step.batch} × {step.length}",
            (x, y),
            (9, (place - up) * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=_COLORS[step.kind],
        )
