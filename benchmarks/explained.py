"""Explains the published sizes' steps, and says how much of them has a name.

    python benchmarks/explained.py [--sizes gpt-neo-125m ...] [--steps train decode ...]
        [--output docs/explained.json]

Each step is compiled for TPUs that need not be there, which takes seconds to minutes. A row says
how much of what is sent has the name of an argument or a line of source, how much of the peak has a
name, and how far the peak by the program's schedule is from the compiler's own figure.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

SIZES = ("gpt-neo-125m", "gpt-neo-1.3b", "gpt-neo-2.7b")
STEPS = ("train", "prefill", "decode", "serve")
OPTIONS = {
    "train": ["--topology", "v5e:4x4", "--mesh", "fsdp=8,model=2", "--batch", "16"],
    "prefill": ["--topology", "v5e:2x4", "--mesh", "data=2,model=4", "--batch", "8"],
    "decode": ["--topology", "v5e:2x4", "--mesh", "data=2,model=4", "--batch", "8"],
    "serve": ["--topology", "v5e:2x4", "--mesh", "data=2,model=4", "--batch", "8"],
}


def explained(size: str, step: str) -> dict:
    """Returns a row of the table."""
    rules = [] if step == "train" else ["--rules", "decode"]
    words = ["plan", "--model", size, "--step", step, *OPTIONS[step], *rules]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "neo_jax", *words, "--explain", "--json"],
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
        "seconds": round(time.perf_counter() - start, 1),
        "compile_seconds": round(plan["compile_seconds"], 1),
        "sent": sent,
        "with_a_line": known / sent if sent else 1.0,
        "findings": sorted({found["rule"] for row in moved for found in row["findings"]}),
        "peak": peak["bytes"],
        "compiler": peak["compiler"],
        "named": named / peak["bytes"],
        "changes": [change["name"] for change in peak["changes"]],
    }


def main() -> None:
    """Runs the command line; rows that the output has already are kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--steps", nargs="+", default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("docs/explained.json"))
    options = parser.parse_args()
    rows = json.loads(options.output.read_text()) if options.output.exists() else []
    for size in options.sizes:
        for step in options.steps:
            row = explained(size, step)
            print(json.dumps(row), flush=True)
            rows = [each for each in rows if (each["size"], each["step"]) != (size, step)]
            rows.append(row)
            options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
