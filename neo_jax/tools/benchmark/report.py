"""What was measured: a table for people, fields for JSON, a picture."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from neo_jax.files.figure import as_png, new_figure
from neo_jax.tools.benchmark.run import Result
from neo_jax.tools.plan.report import without_nan

_WIDTHS = (-8, 5, 7, 11, 12, 14, 9, 11, 9, 8)
_COLORS = {"prefill": "#0b6e99", "decode": "#c8553d", "train": "#5b8c3a"}
_MARKERS = {"prefill": "o", "decode": "s", "train": "^"}
_INK, _FAINT = "#222222", "#9a9a9a"


def describe(result: Result) -> dict[str, Any]:
    """Returns fields for JSON; figures are of all devices together, None is unknown."""
    setup, limits, chip = result.setup, result.limits, result.published
    model, sharding, number = setup.model, setup.model.sharding, len(setup.devices)
    fields = {
        "model": setup.name,
        "parameters": model.config.num_params,
        "device_kind": setup.devices[0].device_kind,
        "devices": number,
        "mesh": dict(sharding.mesh.shape) if sharding else {},
        "dtype": jnp.dtype(model.dtype).name,
        "kernel": model.kernel,
        "limits": {
            "flops_per_second": limits.products,
            "product_shapes": limits.product_shapes,
            "bytes_per_second": limits.bandwidth,
            "reading": limits.reading,
        },
        "published": {
            "flops_per_second": chip.peak_flops * number,
            "bytes_per_second": chip.memory_bandwidth * number,
        },
    }
    steps = [
        {
            "step": step.kind,
            "batch": step.batch,
            "length": step.length,
            "tokens": step.tokens,
            "seconds": step.seconds,
            "repeats": step.repeats,
            "tokens_per_second": step.tokens_per_second,
            "flops": step.flops,
            "bytes": step.traffic,
            "share_of_products": result.share_of_products(step),
            "share_of_memory": result.share_of_memory(step),
            "mfu": result.utilisation(step),
            "note": step.note or None,
        }
        for step in result.measurements
    ]
    return without_nan(fields) | {"measurements": list(map(without_nan, steps))}


def lines(result: Result) -> Iterator[str]:
    """Yields a table, line by line."""
    setup, limits = result.setup, result.limits
    model, sharding, number = setup.model, setup.model.sharding, len(setup.devices)
    yield f"model      {setup.name}, {model.config.num_params:,} parameters"
    mesh = sharding.mesh.shape if sharding else {}
    devices = [f"{number} x {setup.devices[0].device_kind}"]
    yield "devices    " + ", ".join(devices + [f"{name}={size}" for name, size in mesh.items()])
    yield f"dtype      {jnp.dtype(model.dtype).name}"
    rates = ", ".join(f"{rate_text(v, 'FLOP/s')} in {k}" for k, v in limits.products.items())
    yield f"measured   {rates}; reading {rate_text(limits.bandwidth, 'B/s')}"
    if not math.isnan(result.published.peak_flops):
        peak = rate_text(result.published.peak_flops * number, "FLOP/s")
        yield f"published  {peak} in bfloat16: what MFU is a share of"
    yield ""
    columns = ("step", "batch", "length", "ms a step", "tokens/s")
    yield _row(*columns, "products", "of limit", "memory", "of limit", "MFU")
    for step in result.measurements:
        cells = (step.kind, str(step.batch), str(step.length))
        if step.note:
            yield f"{_row(*cells)}   {step.note}"
            continue
        yield _row(
            *cells,
            f"{1e3 * step.seconds:,.1f}",
            f"{step.tokens_per_second:,.1f}",
            rate_text(step.flops_per_second, "FLOP/s"),
            _percent(result.share_of_products(step)),
            rate_text(step.bytes_per_second, "B/s"),
            _percent(result.share_of_memory(step)),
            _percent(result.utilisation(step)),
        )


def _row(*cells: str) -> str:
    widths = zip(cells, _WIDTHS, strict=False)
    return "".join(f"{text:<{-w}}" if w < 0 else f"{text:>{w}}" for text, w in widths)


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1%}"


def rate_text(value: float, unit: str) -> str:
    """Returns a rate in words, three digits: "1.23 TFLOP/s"."""
    power = min(5, max(0, int(math.log10(max(value, 1)) // 3)))
    return f"{value / 1000**power:.3g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


def draw(result: Result) -> bytes:
    """Returns a PNG, a roofline: steps as points below the limits that were measured.

    From left to right a step does more products with each byte that it must move: under the slope
    memory holds it up, under the level line the products do (Williams, Waterman and Patterson,
    2009).
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
