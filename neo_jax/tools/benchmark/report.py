"""What was measured, for people and for programs: a table, and fields for JSON."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from neo_jax.tools.benchmark.run import Result
from neo_jax.tools.benchmark.timed_steps import Measurement

_WIDTHS = (-8, 5, 7, 11, 12, 14, 9, 11, 9, 8)


def describe(result: Result) -> dict[str, Any]:
    """Returns fields for JSON; figures are of all devices together, None is unknown."""
    setup, limits, chip = result.setup, result.limits, result.published
    model, sharding, number = setup.model, setup.model.sharding, len(setup.devices)
    return {
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
            "flops_per_second": _known(chip.peak_flops * number),
            "bytes_per_second": _known(chip.memory_bandwidth * number),
        },
        "measurements": [_fields(result, step) for step in result.measurements],
    }


def _fields(result: Result, step: Measurement) -> dict[str, Any]:
    fields = {
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
    return {name: _known(v) if isinstance(v, float) else v for name, v in fields.items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


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
