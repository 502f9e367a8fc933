"""A plan, and a ranking of meshes: a table for people, fields for JSON, a picture."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from neo_jax.devices.memory import bytes_text
from neo_jax.files.figure import as_png, new_figure
from neo_jax.model.cache import sequence_bytes
from neo_jax.tools.plan.plan import Plan, utilisation
from neo_jax.tools.plan.predict import Prediction
from neo_jax.tools.plan.serving import Served
from neo_jax.tools.plan.steps import Step


def describe(plan: Plan) -> dict[str, Any]:
    """Returns a plan as fields for JSON; bytes and FLOPs are of a device, None is unknown."""
    memory, step, roof = plan.memory, plan.step, plan.roofline
    chip, work = plan.topology.chip, plan.work
    fields = {
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "device_kind": plan.topology.devices[0].device_kind,
        "parameters": step.model.config.num_params,
        "trains": step.trains or None,
        "mesh": dict(step.mesh.shape),
        "rules": {axis: list(names) for axis, names in step.sharding.rules},
        "dtype": str(step.model.dtype),
        "tokens": step.tokens,
        "fits": plan.fits,
        "refusal": plan.refusal or None,
        "memory": dataclasses.asdict(memory),
        "flops": {
            "useful": plan.useful_flops,
            "repeated": plan.repeated_flops,
            "program": work.flops if work else None,
        },
        "cache": _cache(step),
        "memory_traffic": work.memory_bytes if work else None,
        "collectives": [{**row._asdict(), "axes": list(row.axes)} for row in plan.traffic],
        "roofline_ms": {**roof.milliseconds, "step": 1e3 * roof.step} if roof else None,
        "mfu": utilisation(chip, roof, plan.useful_flops) if roof else None,
        "tokens_per_second": step.tokens / roof.step if roof else None,
        "predicted": _predicted(plan),
        "compile_seconds": plan.compile_seconds,
        "program_bytes": len(plan.program) or None,
    }
    return without_nan(fields)


def _predicted(plan: Plan) -> dict[str, Any] | None:
    times = plan.prediction
    if times is None:
        return None
    parts = {name: 1e3 * seconds for name, seconds in times.parts.items()}
    return {
        "ms": {**parts, "collectives": 1e3 * times.collectives, "step": 1e3 * times.step},
        "mfu": utilisation(plan.topology.chip, times, plan.useful_flops),
        "tokens_per_second": plan.step.tokens / times.step,
    }


def _cache(step: Step) -> dict[str, Any] | None:
    """Returns what the cache of a sequence takes of all devices together, in decoding."""
    if step.kind not in ("decode", "serve"):
        return None
    dtype = np.dtype(step.model.cache_dtype or step.model.dtype)
    memory = sequence_bytes(step.model.config, step.length, dtype)
    return {"dtype": dtype.name, **memory._asdict()}


def without_nan(value: Any) -> Any:
    """Returns fields with None in the place of what is not known."""
    if isinstance(value, dict):
        return {name: without_nan(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def lines(plan: Plan) -> Iterator[str]:
    """Yields a plan as a table, some lines at a time."""
    memory, step, roof, done = plan.memory, plan.step, plan.roofline, plan.work
    devices = f"{len(plan.topology.devices)} x {plan.topology.devices[0].device_kind}"
    yield f"topology      {plan.topology.name}, {devices}"
    if step.trains:
        yield f"trains        {step.trains}"
    yield "mesh          " + ", ".join(f"{name}={size}" for name, size in step.mesh.shape.items())
    yield "rules         " + ", ".join(f"{a}:{'+'.join(names)}" for a, names in step.sharding.rules)
    yield f"tokens        {step.tokens:,} a step, {step.model.config.num_params:,} parameters"
    yield "\nmemory of a device"
    for name, size in memory.parts.items():
        padding = size - memory.parts_without_padding[name]
        note = f"{bytes_text(padding)} of it padding" if padding else ""
        yield _row(name, bytes_text(size), note)
    if cache := _cache(step):
        note = f"on all devices, {bytes_text(cache['per_token'])} a token, {cache['dtype']}"
        yield _row("cache, a sequence", bytes_text(cache["per_sequence"]), note)
    if memory.temporaries is not None:
        yield _row("temporaries", bytes_text(memory.temporaries), "activations, gradients")
    source = "by the compiler, which refuses; the rest by arithmetic" if plan.refusal else ""
    yield _row("in all", bytes_text(memory.total), source)
    if not math.isnan(memory.capacity):
        yield _row("of", bytes_text(memory.capacity), "fits" if plan.fits else "does not fit")
    yield "\nproducts of a device"
    yield _row("useful", f"{plan.useful_flops / 1e12:.3f}") + " TFLOP"
    yield _row("computed again", f"{plan.repeated_flops / 1e12:.3f}") + " TFLOP"
    if done is None or roof is None:
        return
    yield _row("in the program", f"{done.flops / 1e12:.3f}") + " TFLOP"
    yield "\ncollectives, what a device sends"
    sent = [row for row in plan.traffic if row.wire_bytes]
    for row in sent:
        where = "+".join(row.axes) + (", between slices" if row.between_slices else "")
        yield _row(row.kind, bytes_text(row.wire_bytes), f"{row.times:>6} times along {where}")
    if not sent:
        yield "  none"
    yield "\nleast time of a step"
    if math.isnan(roof.step):
        yield f"  not known of a {plan.topology.devices[0].device_kind}"
    for name, milliseconds in roof.milliseconds.items():
        if milliseconds > 0:  # neither unknown nor without a part in it
            yield _row(name, f"{milliseconds:.2f}") + " ms"
    if not math.isnan(roof.step):
        share = utilisation(plan.topology.chip, roof, plan.useful_flops)
        speed = f"{step.tokens / roof.step:,.0f} tokens/s"
        yield f"  bound by {roof.slowest}: {speed}, MFU at most {share:.1%}"
    if plan.prediction and not math.isnan(plan.prediction.step):
        yield "\npredicted time of a step"
        yield from _prediction_lines(plan, plan.prediction)
    yield f"compiled in {plan.compile_seconds:.1f} s"


_PARTS = {
    "products": "bound by products",
    "vectors": "bound by the vector units, in attention",
    "memory": "bound by memory",
    "waiting": "in which devices wait for each other",
}


def _prediction_lines(plan: Plan, times: Prediction) -> Iterator[str]:
    for name, seconds in times.parts.items():
        if seconds:
            yield _row(name, f"{1e3 * seconds:.2f}") + f" ms  {_PARTS[name]}"
    share = utilisation(plan.topology.chip, times, plan.useful_flops)
    speed = f"{plan.step.tokens / times.step:,.0f} tokens/s"
    yield _row("in all", f"{1e3 * times.step:.2f}") + f" ms  {speed}, MFU {share:.1%}"


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<20}{value:>10}  {note}".rstrip()


def draw(plan: Plan) -> bytes:
    """Returns a PNG: what fills a device's memory, what it sends, and the times of a step."""
    figure = new_figure(10, 5.5, f"{plan.topology.name}: {plan.step.tokens:,} tokens a step")
    bars, sent, times = figure.subplots(3, 1, height_ratios=[1, 2, 2])
    left = 0.0
    parts = dict(plan.memory.parts)
    if plan.memory.temporaries is not None:
        parts["temporaries"] = plan.memory.temporaries
    for name, size in parts.items():
        bars.barh(["memory"], [size / 1e9], left=[left], label=f"{name} {bytes_text(size)}")
        left += size / 1e9
    if not math.isnan(plan.memory.capacity):
        bars.axvline(plan.memory.capacity / 1e9, color="black", linestyle="--", label="capacity")
    bars.set_xlabel("GB a device")
    bars.legend(fontsize=8, loc="upper right")
    for row in plan.traffic[:6][::-1]:
        sent.barh([f"{row.kind}, {'+'.join(row.axes)}"], [row.wire_bytes / 1e9], color="C0")
    sent.set_xlabel("GB that a device sends a step")
    least = plan.roofline.milliseconds if plan.roofline else {}
    known = {name: each for name, each in least.items() if not math.isnan(each)}
    times.barh(list(known), list(known.values()))
    times.set_xlabel("least time, ms a step")
    return as_png(figure)


def describe_servers(servers: Sequence[Served]) -> dict[str, Any]:
    """Returns servers as fields for JSON, the largest last."""
    return {
        "topology": servers[-1].plan.topology.name,
        "max_sequences": servers[-1].rows if servers[-1].fits else None,
        "servers": [
            {"sequences": each.rows, "memory": each.memory, "plan": describe(each.plan)}
            for each in servers
        ],
    }


def server_lines(servers: Sequence[Served]) -> Iterator[str]:
    """Yields servers as a table, and the step of the largest as one, some lines at a time."""
    largest = servers[-1]
    length, size = largest.plan.step.length, bytes_text(largest.plan.memory.capacity)
    if largest.fits:
        yield f"sequences     --max-sequences {largest.rows}, of up to {length:,} tokens, in {size}"
    yield f"\n{'sequences':>9}{'a device':>12}{'step':>12}{'tokens/s':>10}"
    for each in servers:
        roof = each.plan.roofline
        known = roof is not None and math.isfinite(roof.step)
        step = f"{1e3 * roof.step:.2f} ms" if roof and known else ""
        speed = f"{each.rows / roof.step:,.0f}" if roof and known else ""
        note = "" if each.fits else "  does not fit"
        yield f"{each.rows:>9}{bytes_text(each.memory):>12}{step:>12}{speed:>10}{note}"
    yield "\na device holds at most: a step, prompts that are being read, what is kept of prompts,"
    yield "both batches where one takes the place of another; the step of the largest:\n"
    yield from lines(largest.plan)
