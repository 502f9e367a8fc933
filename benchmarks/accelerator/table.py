"""The table of all results, in Markdown."""

import math
from collections import defaultdict
from typing import Any

from accelerator.rows import Key, Row
from neo_jax.devices.chips import chip

TABLES = {
    "device": (
        "What the device can do, measured and as published",
        {
            "device": "{device}, JAX {jax}",
            "float32 TFLOP/s": "{float32:.3g}",
            "bfloat16 TFLOP/s": "{bfloat16:.4g}",
            "published": "{peak:.4g}",
            "reading GB/s": "{reading:.4g}",
            "published GB/s": "{published_reading:.4g}",
        },
    ),
    "kernels": (
        "Attention kernels against `dense` in float32: relative errors, the worst of all shapes",
        {
            "kernel": "{kernel}",
            "dtype": "{dtype}",
            "shapes": "{shapes}",
            "values": "{values:.1e}",
            "gradients": "{gradients:.1e}",
            "allowed": "{tolerance:.1e}",
            "verdict": "{verdict}",
        },
    ),
    "parity": (
        "Greedy texts and logits against transformers, float32",
        {
            "model": "{row}",
            "same tokens": "{same} of {tokens}",
            "largest gap where they part": "{gap:.1e}",
            "logits off by": "{logits_off:.1e}",
            "allowed": "{tolerance:.1e}",
        },
    ),
    "decode": (
        "Decoding, greedy; transformers in bfloat16",
        {
            "model": "{model}",
            "weights": "{weights}",
            "batch": "{batch}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "ms a step": "{ms:.3g}",
            "GB/s": "{gigabytes:,.0f}",
            "of measured bandwidth": "{of_reading:.1%}",
            "transformers tokens/s": "{plain:,.0f}",
            "compiled": "{compiled:,.0f}",
        },
    ),
    "train": (
        "Training, bfloat16 products and AdamW",
        {
            "model": "{model}",
            "batch": "{batch} x {length}",
            "remat": "{remat}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "TFLOP/s": "{teraflops:.3g}",
            "MFU": "{of_peak:.1%}",
            "of measured products": "{of_products:.1%}",
        },
    ),
    "prefill": (
        "Prefill, bfloat16",
        {
            "model": "{model}",
            "batch": "{batch} x {length}",
            "tokens/s": "{tokens_per_second:,.0f}",
            "TFLOP/s": "{teraflops:.3g}",
            "MFU": "{of_peak:.1%}",
            "of measured products": "{of_products:.1%}",
            "transformers tokens/s": "{plain:,.0f}",
            "compiled": "{compiled:,.0f}",
        },
    ),
    "memory": (
        "Memory of steps that set a peak, GB: all arrays, what the compiler plans, what was used",
        {
            "step": "{row}",
            "arrays": "{held:.3f}",
            "planned": "{planned:.3f}",
            "peak": "{used:.3f}",
            "peak over plan": "{over:.3f}",
        },
    ),
}
"""By kind of part its title, and its columns with what each says of a row."""


def markdown(found: dict[Key, Row]) -> str:
    """Returns a page: a table for each kind of part, and what is wrong or missing."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for (part, name), row in found.items():
        if "error" not in row:
            groups[part.split()[0]].append({"row": name, "kind": part.split()[0]} | row)
    device = _device(groups["device"])
    theirs = {
        (row["model"], row["task"], row["batch"], row["how"]): row["tokens_per_second"]
        for row in groups["transformers"]
    }
    groups["device"] = [device] if groups["device"] else []
    groups["kernels"] = _worst(groups["kernels"])
    for kind in ("decode", "train", "prefill"):
        groups[kind] = [_with_shares(row, device, theirs) for row in groups[kind]]
    groups["memory"] = [
        row for row in groups["decode"] + groups["train"] if row.get("peak_bytes") is not None
    ]
    sections = [
        "\n".join([f"## {title}", "", *_lines(columns, groups[kind])])
        for kind, (title, columns) in TABLES.items()
        if groups[kind]
    ]
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (part, name), row in found.items():
        if {"failed", "error"} & row.keys():
            reasons[part, row.get("failed") or row["error"]].append(name)
    wrong = [
        f"- {part}, {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {reason}"
        for (part, reason), names in reasons.items()
    ]
    sections.append("\n".join(["## Wrong or missing", "", *(wrong or ["Nothing."])]))
    return "\n\n".join(["# On an accelerator", *sections]) + "\n"


def _lines(columns: dict[str, str], group: list[Row]) -> list[str]:
    texts = [[text.format(**row) for text in columns.values()] for row in group]
    cells = [["-" if "nan" in cell else cell for cell in line] for line in texts]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *cells)]


def _device(group: list[Row]) -> Row:
    row = group[0] if group else {"device": "", "products": {}}
    published = chip(row["device"])
    return row | {
        "float32": row["products"].get("float32", math.nan) / 1e12,
        "bfloat16": row["products"].get("bfloat16", math.nan) / 1e12,
        "peak": published.peak_flops / 1e12,
        "reading": row.get("bandwidth", math.nan) / 1e9,
        "published_reading": published.memory_bandwidth / 1e9,
    }


def _worst(group: list[Row]) -> list[Row]:
    """Returns a row for each kernel and dtype."""
    together: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in group:
        together[row["kernel"], row["dtype"]].append(row)
    found = []
    for (kernel, dtype), cases in together.items():
        done = [row for row in cases if "values" in row]
        wrong = sum("failed" in row for row in done)
        verdict = [f"{wrong} wrong" if wrong else "right"] * bool(done)
        verdict += sorted({row["note"] for row in cases if "note" in row})
        row = {"kernel": kernel, "dtype": dtype, "shapes": len(done), "verdict": "; ".join(verdict)}
        for name in ("values", "gradients", "tolerance"):
            # Of errors that are no number the largest is none.
            row[name] = max((each[name] for each in done), default=math.nan, key=_nan_last)
        found.append(row)
    return found


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _with_shares(row: Row, device: Row, theirs: dict[Any, float]) -> Row:
    """Adds to a row what share of the limits it reaches, and what transformers does."""
    teraflops = row.get("flops_per_second", math.nan) / 1e12
    gigabytes = row.get("bytes_per_second", math.nan) / 1e9
    held, planned, used = (
        (row.get(f"{name}_bytes") or math.nan) / 1e9 for name in ("held", "planned", "peak")
    )
    peers = {
        how: theirs.get((row["model"], row["kind"], row["batch"], how), math.nan)
        for how in ("plain", "compiled")
    }
    return row | peers | {
        "ms": 1e3 * row["seconds"],
        "teraflops": teraflops,
        "of_peak": teraflops / device["peak"],
        "of_products": teraflops / device["bfloat16"],
        "gigabytes": gigabytes,
        "of_reading": gigabytes / device["reading"],
        "held": held,
        "planned": planned,
        "used": used,
        "over": used / planned,
    }  # fmt: skip
