"""Explains the steps of every published size, and says how much of them has a name.

    python benchmarks/explained.py [--sizes gpt-neo-125m ...] [--steps train decode ...]
        [--seconds 200] [--again]      # writes docs/explained.json and the table of docs/explain.md

Each step is compiled for TPUs that need not be there, which takes seconds to minutes. A row says
how much of what is sent has a line of source, which findings there are, how much of the peak has a
name, and how far the peak by the program's schedule is from the compiler's own figure. Rows are of
a version of JAX, and those that are there are not made again; after `--seconds` it begins no more,
to be continued. The table is of the newest version, and says how far the others are from it.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from marked_tables import fill

ROOT = Path(__file__).parents[1]
DOCUMENT, RESULTS = ROOT / "docs" / "explain.md", ROOT / "docs" / "explained.json"
SIZES = (
    "gpt-neo-125m", "gpt-neo-1.3b", "gpt-neo-2.7b", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl",
)  # fmt: skip
STEPS = ("train", "cpu", "prefill", "decode", "serve")  # "cpu" trains on eight devices of a CPU
ODD_HEADS = ("gpt2-xl",)  # 25 heads, which no number of devices splits
Row = dict[str, Any]


def options(size: str, step: str) -> list[str]:
    """Returns how a step of a size is planned, as `neo-jax plan` takes it."""
    odd = size in ODD_HEADS
    if step == "train":
        mesh = "fsdp=16" if odd else "fsdp=8,model=2"
        return ["--topology", "v5e:4x4", "--mesh", mesh, "--batch", "16"]
    if step == "cpu":
        mesh = "fsdp=8" if odd else "fsdp=4,model=2"
        return ["--topology", "cpu:8", "--mesh", mesh, "--batch", "8", "--length", "256"]
    mesh = "data=8" if odd else "data=2,model=4"
    words = ["--topology", "v5e:2x4", "--mesh", mesh, "--batch", "8", "--rules", "decode"]
    return [*words, "--step", step]


def explained(size: str, step: str) -> Row:
    """Returns a row of the table."""
    words = options(size, step)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "neo_jax", "plan", "--model", size, *words, "--explain", "--json"],
        stdout=subprocess.PIPE,
        check=True,
        env={**os.environ, "TPU_MIN_LOG_LEVEL": "3"},
    )
    fields = json.loads(done.stdout)
    plan = fields["servers"][-1]["plan"] if "servers" in fields else fields
    moved, peak = fields["explanation"]["collectives"], fields["explanation"]["peak"]
    sent = sum(row["wire_bytes"] for row in moved)
    known = sum(row["wire_bytes"] for row in moved if row["line"])
    named = sum(each["bytes"] for each in peak["arrays"] if each["name"] != "smaller arrays")
    return {
        "size": size,
        "step": step,
        "jax": jax.__version__,
        "mesh": words[words.index("--mesh") + 1],
        "seconds": round(time.perf_counter() - start, 1),
        "compile_seconds": round(plan["compile_seconds"], 1),
        "sent": sent,
        "with_a_line": known / sent if sent else 1.0,
        "findings": sorted({found["rule"] for row in moved for found in row["findings"]}),
        "predicted_ms": plan["predicted"]["ms"]["step"],  # None on a CPU
        "peak": peak["bytes"],
        "compiler": peak["compiler"],
        "named": named / peak["bytes"],
        "changes": [change["name"] for change in peak["changes"]],
    }


def table(rows: Sequence[Row]) -> str:
    """Returns rows as Markdown."""
    head = "| step | mesh | sent | with a line | findings | peak | by the compiler | |"
    lines = [head, "|" + " --- |" * (head.count("|") - 1)]
    for row in rows:
        findings = ", ".join(f"`{each}`" for each in row["findings"]) or "none"
        cells = [
            f"{row['size']} {_NAMES.get(row['step'], row['step'])}", f"`{row['mesh']}`",
            _size(row["sent"]), f"{row['with_a_line']:.0%}", findings, _size(row["peak"]),
            _size(row["compiler"]), f"{row['peak'] / row['compiler'] - 1:+.1%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_NAMES = {"cpu": "train, 8 CPU devices"}


def _size(number: float) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.1f} MB" if number >= 1e7 else f"{number / 1e6:.2f} MB"


def summary(rows: Sequence[Row], others: Sequence[Row]) -> str:
    """Returns how far peaks are from the compiler's, and versions of JAX from each other."""
    errors = [abs(row["peak"] / row["compiler"] - 1) for row in rows]
    text = (
        f"The peak of {len(rows)} steps is at most {max(errors):.1%} from the compiler's figure; "
        f"of what a device sends at least {min(row['with_a_line'] for row in rows):.0%} has a line "
        f"(jax {rows[0]['jax']})."
    )
    for version, group in itertools.groupby(others, lambda row: row["jax"]):
        found = {(row["size"], row["step"]): row for row in group}
        both = [(row, found[key]) for row in rows if (key := (row["size"], row["step"])) in found]
        if not both:
            continue
        apart = {
            name: max(abs(two[key] / one[key] - 1) for one, two in both if one[key])
            for name, key in (("peaks", "peak"), ("bytes sent", "sent"), ("times", "predicted_ms"))
            if any(one[key] for one, _ in both)
        }
        findings = sum(one["findings"] != two["findings"] for one, two in both)
        error = max(abs(two["peak"] / two["compiler"] - 1) for _, two in both)
        text += (
            f" By jax {version}, {len(both)} of them, peaks are at most {error:.1%} from the "
            f"compiler's; findings differ in {findings} steps, "
            + ", ".join(f"{name} by at most {share:.1%}" for name, share in apart.items())
            + "."
        )
    return text


def write(rows: Sequence[Row]) -> None:
    """Writes the JSON, and puts table and summary into the page behind their marks."""
    place = {name: number for number, name in enumerate((*SIZES, *STEPS))}
    rows = sorted(rows, key=lambda row: (row["jax"], place[row["size"]], place[row["step"]]))
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    newest = max((row["jax"] for row in rows), key=lambda name: [*map(int, name.split("."))])
    own = [row for row in rows if row["jax"] == newest]
    others = [row for row in rows if row["jax"] != newest]
    fill(DOCUMENT, {"explained": table(own), "summary": summary(own, others)})


def main() -> None:
    """Makes the rows that are not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--again", action="store_true", help="make rows that are there, too")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for size, step in itertools.product(args.sizes, args.steps):
        this = size, step, jax.__version__
        others = [row for row in rows if (row["size"], row["step"], row["jax"]) != this]
        if time.monotonic() > end or (len(others) < len(rows) and not args.again):
            continue
        row = explained(size, step)
        print(json.dumps(row), flush=True)
        rows = [*others, row]
        write(rows)


if __name__ == "__main__":
    main()
