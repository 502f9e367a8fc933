"""The table of all results, in Markdown."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from accelerator.rows import Key, Row


def markdown(found: dict[Key, Row]) -> str:
    """Returns a page: a table for each kind of part, and what is wrong or missing."""
    device = found.get(("device", "limits"), {})
    groups: dict[str, list[Row]] = defaultdict(list)
    for (part, name), row in found.items():
        if part != "device" and "error" not in row:
            groups[part.split()[0]].append({"row": name} | row)
    theirs = {
        (row["model"], row["kind"], row["batch"], row["how"]): row["tokens_per_second"]
        for row in groups["transformers"]
    }
    sections = [
        _device(device),
        *_kernels(groups["kernels"]),
        *_parity(groups["parity"]),
        *_decoding(groups["decode"], device, theirs),
        *_training(groups["train"], device),
        *_prefill(groups["prefill"], device, theirs),
        *_memory(groups["decode"] + groups["train"]),
        *_wrong(found),
    ]
    return "\n\n".join(["# On an accelerator", *sections]) + "\n"


def _device(device: Row) -> str:
    if "products" not in device:
        return "The device was not measured."
    rates = ", ".join(f"{rate / 1e12:.3g} TFLOP/s {of}" for of, rate in device["products"].items())
    return (
        f"{device['device']}, JAX {device['jax']}. Measured: products {rates}; reading memory "
        f"{device['bandwidth'] / 1e9:.4g} GB/s. Published: "
        f"{_number(device['published']['peak_flops'] / 1e12)} TFLOP/s, "
        f"{_number(device['published']['memory_bandwidth'] / 1e9)} GB/s."
    )


def _kernels(group: list[Row]) -> Iterator[str]:
    together: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in group:
        together[row["kernel"], row["dtype"]].append(row)
    lines = []
    for (kernel, dtype), cases in together.items():
        done = [row for row in cases if "values" in row]
        notes = sorted({row["note"] for row in cases if "note" in row})
        worst = [max((row[name] for row in done), default=math.nan, key=_nan_last)
                 for name in ("values", "gradients", "tolerance")]  # fmt: skip
        wrong = sum("failed" in row for row in done)
        verdict = "; ".join([f"{wrong} wrong" if wrong else "right"] * bool(done) + notes)
        lines.append([kernel, dtype, len(done), *map(_small, worst), verdict])
    yield from _table(
        "Attention kernels against `dense` in float32: relative error, the worst of all shapes",
        ["kernel", "dtype", "shapes", "values", "gradients", "allowed", "verdict"],
        lines,
    )


def _parity(group: list[Row]) -> Iterator[str]:
    yield from _table(
        "Greedy texts against transformers, float32",
        ["model", "same tokens", "largest gap where they part", "logits off by", "allowed"],
        [
            [row["row"], f"{row['same']} of {row['tokens']}", _small(row["gap"]),
             _small(row["logits_off"]), _small(row["tolerance"])]
            for row in group
        ],
    )  # fmt: skip


def _decoding(group: list[Row], device: Row, theirs: dict[Any, float]) -> Iterator[str]:
    lines = []
    for row in group:
        peers = [theirs.get((row["model"], "decode", row["batch"], how), math.nan)
                 for how in ("plain", "compiled")]  # fmt: skip
        lines.append([
            row["model"], row["weights"], row["batch"], _number(row["tokens_per_second"]),
            f"{1e3 * row['seconds']:.3g}", _number(row["bytes_per_second"] / 1e9),
            _share(row["bytes_per_second"], device.get("bandwidth")),
            *map(_number, peers),
        ])  # fmt: skip
    yield from _table(
        "Decoding, greedy; transformers in bfloat16, tokens/s",
        ["model", "weights", "batch", "tokens/s", "ms a step", "GB/s", "of measured bandwidth",
         "transformers", "compiled"],
        lines,
    )  # fmt: skip


def _training(group: list[Row], device: Row) -> Iterator[str]:
    yield from _table(
        "Training, bfloat16 products and AdamW",
        ["model", "batch", "remat", "tokens/s", "TFLOP/s", "MFU", "of measured products"],
        [
            [row["model"], f"{row['batch']} x {row['length']}", row["remat"],
             _number(row["tokens_per_second"]), *_rates(row, device)]
            for row in group
        ],
    )  # fmt: skip


def _prefill(group: list[Row], device: Row, theirs: dict[Any, float]) -> Iterator[str]:
    lines = []
    for row in group:
        peers = [theirs.get((row["model"], "prefill", row["batch"], how), math.nan)
                 for how in ("plain", "compiled")]  # fmt: skip
        lines.append([
            row["model"], f"{row['batch']} x {row['length']}", _number(row["tokens_per_second"]),
            *_rates(row, device), *map(_number, peers),
        ])  # fmt: skip
    yield from _table(
        "Prefill, bfloat16; transformers in tokens/s",
        ["model", "batch", "tokens/s", "TFLOP/s", "MFU", "of measured products", "transformers",
         "compiled"],
        lines,
    )  # fmt: skip


def _memory(group: list[Row]) -> Iterator[str]:
    yield from _table(
        "Memory of steps that set a peak: arrays by arithmetic, the compiler's plan, what was used",
        ["step", "arrays GB", "planned GB", "peak GB", "peak over plan"],
        [
            [row["row"], *(f"{row[name] / 1e9:.3f}" for name in _BYTES),
             f"{row['peak_bytes'] / row['planned_bytes']:.3f}"]
            for row in group
            if row.get("peak_bytes")
        ],
    )  # fmt: skip


_BYTES = ("held_bytes", "planned_bytes", "peak_bytes")


def _wrong(found: dict[Key, Row]) -> Iterator[str]:
    lines = [
        f"- {part}, {name}: {row.get('failed') or row.get('error')}"
        for (part, name), row in found.items()
        if {"failed", "error"} & row.keys()
    ]
    yield "\n".join(["## Wrong or missing", "", *(lines or ["Nothing."])])


def _rates(row: Row, device: Row) -> list[str]:
    rate = row["flops_per_second"]
    peak = device.get("published", {}).get("peak_flops")
    measured = device.get("products", {}).get("bfloat16")
    return [_number(rate / 1e12), _share(rate, peak), _share(rate, measured)]


def _table(title: str, columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> Iterator[str]:
    if lines:
        head = [columns, ["---"] * len(columns)]
        cells = ("| " + " | ".join(map(str, line)) + " |" for line in [*head, *lines])
        yield "\n".join([f"## {title}", "", *cells])


def _share(value: float, whole: float | None) -> str:
    return "-" if whole is None or math.isnan(whole) else f"{value / whole:.1%}"


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _small(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1e}"


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
