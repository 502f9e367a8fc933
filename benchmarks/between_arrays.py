"""What a TPU's compiler sets aside for arrays of a step, next to those that are alive.

    python benchmarks/between_arrays.py [--sizes gpt-neo-125m ...] [--steps prefill ...]
        # adds to docs/between_arrays.json, writes the table of docs/explain.md

The compiler puts what is neither argument nor result into one block, and writes down where and for
how long. A row has the size of that block, the most bytes of it that hold arrays at a time by what
is written there, and the same by `neo_jax.tools.plan.lifetimes`, which knows the schedule alone.
"""

import argparse
import collections
import itertools
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from explained import SIZES, STEPS, options
from marked_tables import fill

from neo_jax.cli import parse
from neo_jax.cli.plan import StepOptions, _step, _strategy
from neo_jax.tools.plan.hlo import parse as parse_text
from neo_jax.tools.plan.lifetimes import lifetimes
from neo_jax.tools.plan.topology import find_topology

ROOT = Path(__file__).parents[1]
DOCUMENT, RESULTS = ROOT / "docs" / "explain.md", ROOT / "docs" / "between_arrays.json"


def measure(size: str, step: str) -> dict[str, Any]:
    """Returns a row: bytes of a device."""
    words = ["--model", size, *options(size, step)]
    asked = parse(StepOptions, "plan", words, default=StepOptions())
    topology = find_topology(asked.plan.topology)
    lowered = _step(asked, topology, *_strategy(asked)).trace().lower()
    with tempfile.TemporaryDirectory() as folder:
        dumped: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        lowered.compile(compiler_options=dumped)
        text, places, ranges = (
            next(Path(folder).glob(f"**/*.after_optimizations{end}.txt")).read_text()
            for end in ("", "-buffer-assignment", "-live-range")
        )
    block, alive = most_alive(places, ranges)
    timeline = lifetimes(parse_text(text), text)
    at_peak = timeline.alive(timeline.peak)
    ours = sum(life.size for life in at_peak if not (life.is_argument or life.reserved))
    row = {"size": size, "step": step, "jax": jax.__version__}
    return {**row, "block": block, "alive": alive, "by_schedule": ours}


def most_alive(places: str, ranges: str) -> tuple[int, int]:
    """Returns the bytes of the compiler's block, and the most of it that is in use at a time."""
    blocks = [each for each in re.split(r"(?m)^allocation ", places) if _is_block(each)]
    block = max(blocks, key=lambda each: each.count("value:"))
    listed = ranges.partition("BufferLiveRange:")[2].partition("Live ranges at")[0]
    lives = {
        name: (int(start), int(end))
        for name, start, end in re.findall(r"^\s+(\S+):(\d+)-(\d+)", listed, re.M)
    }
    at: dict[int, list[tuple[int, int, int]]] = collections.defaultdict(list)
    for name, index, size, offset in re.findall(
        r"value: <\d+ (\S+?)(\{[\d,]*\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)", block
    ):
        at[int(offset)].append((*lives[name + (index or "{}")], int(size)))
    changes: dict[int, int] = collections.defaultdict(int)
    for values in at.values():  # of one place: one array under several names, or one after another
        times = sorted({time for start, end, _ in values for time in (start, end + 1)})
        for time, after in itertools.pairwise(times):
            size = max((size for start, end, size in values if start <= time <= end), default=0)
            changes[time] += size
            changes[after] -= size
    alive = itertools.accumulate(changes[time] for time in sorted(changes))
    return int(re.findall(r"size (\d+)", block)[0]), max(alive)


def _is_block(text: str) -> bool:
    head = text.partition("\n")[0]
    return "preallocated-temp" in head and "color" not in head


def table(rows: list[dict[str, Any]]) -> str:
    """Returns rows as Markdown."""
    lines = ["| step | block | alive, by the compiler | by the schedule |", "|" + " --- |" * 4]
    for row in rows:
        sizes = (f"{row[name] / 1e6:.1f} MB" for name in ("block", "alive", "by_schedule"))
        lines.append(f"| {row['size']} {row['step']} | " + " | ".join(sizes) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles what is requested, and writes all rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["gpt-neo-125m"])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["train", "prefill", "decode"])
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    for size, step in itertools.product(args.sizes, args.steps):
        row = measure(size, step)
        print(json.dumps(row), flush=True)
        rows = [each for each in rows if (each["size"], each["step"]) != (size, step)]
        rows.append(row)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    fill(DOCUMENT, {"between": table(rows)})


if __name__ == "__main__":
    main()
