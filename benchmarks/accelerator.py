"""All that a CPU cannot tell, on the accelerator that is here, in 8 minutes; prints a table.

  python benchmarks/accelerator.py [--output accelerator.jsonl] [--table docs/accelerators.md]

Results are added to --output as they come; another call goes on with what is missing or has ended
with an error. Each part runs in a process of its own and is stopped at its limit, what it leaves of
it is the next ones'. What they print is in a file next to the results. The exit status is 1 where
a row is wrong or has an error.

  device        measured rate of products, and of reading memory
  kernels       every attention kernel against `dense`, values and gradients
  parity        greedy texts and logits against transformers, float32
  decode        tokens a second at batch 1 and 64, bfloat16 and int8, as a share of bandwidth
  train         MFU of the step that `train` runs, with its peak memory against the plan
  prefill       MFU of reading prompts
  transformers  decoding and prefill in PyTorch, plain and by torch.compile

--small takes tiny shapes, as a trial of the script on any machine.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the package, where it is not installed

from accelerator import rows, table
from accelerator.parts import HERE, Part, measure, missing, parts
from accelerator.sizes import FULL, SMALL, Sizes


def main() -> int:
    """Runs what is missing; returns the exit status."""
    args = _arguments()
    sizes = SMALL if args.small else FULL
    all_parts = parts(sizes)
    if args.part:
        measure(all_parts[args.part], sizes, args.output, args.call, args.at_once)
        return 0
    chosen = [part for part in all_parts.values() if part.name in (args.parts or all_parts)]
    args.call = 1 + max((row["call"] for row in rows.read(args.output).values()), default=0)
    start, limit = time.perf_counter(), 0.0
    for part in chosen:
        limit = min(limit + part.seconds, args.seconds)
        run_part(part, sizes, args, start + limit)
        _tell(part, rows.read(args.output), time.perf_counter() - start)
    found = rows.read(args.output)
    text = table.markdown(found)
    print(text)
    if args.table:
        args.table.write_text(text)
    return int(any({"failed", "error"} & row.keys() for row in found.values()))


def run_part(part: Part, sizes: Sizes, args: argparse.Namespace, deadline: float) -> None:
    """Runs a part until it is complete or its time is over; every row then says what became of it.

    A process that ends before its time is started again for the rows after; if it told nothing at
    all, so that each program is compiled only for its own row.
    """
    at_once = min(8, os.cpu_count() or 1)
    while todo := missing(part, sizes, args.output, args.call):
        started = time.perf_counter()
        status = _run(part, args, at_once, deadline - started) if deadline > started else None
        ended = f"ended with status {status}"
        if status is None:
            ended = f"stopped after {max(0, deadline - started):.0f} s"
        for key, row in rows.read(args.output).items():
            if key[0] == part.name and row.get("error") == HERE:
                rows.append(args.output, key, row | {"error": f"the process was {ended}"})
        if status is not None and len(missing(part, sizes, args.output, args.call)) < len(todo):
            continue
        if status is not None and at_once > 1:
            at_once = 1
            continue
        for name in missing(part, sizes, args.output, args.call):
            row = {"error": f"not reached: the process was {ended}", "call": args.call}
            rows.append(args.output, (part.name, name), row)


def _run(part: Part, args: argparse.Namespace, at_once: int, seconds: float) -> int | None:
    """Returns the status of a process that measures a part; None where its time was over."""
    command = [sys.executable, __file__, "--output", str(args.output), "--part", part.name]
    command += ["--call", str(args.call), "--at-once", str(at_once), *["--small"] * args.small]
    compiled = Path(tempfile.gettempdir()) / "neo_jax_accelerator"
    environment = os.environ | {
        "XLA_CLIENT_MEM_FRACTION": str(part.memory or 0.1),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the older name of the first
    with args.output.with_suffix(".log").open("a") as log:
        log.write(f"\n--- {part.name}\n")
        log.flush()
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _tell(part: Part, found: dict[rows.Key, rows.Row], seconds: float) -> None:
    mine = [row for key, row in found.items() if key[0] == part.name]
    counts = {kind: sum(kind in row for row in mine) for kind in ("failed", "error", "note")}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    print(f"{seconds:4.0f} s  {part.name}: {len(mine)} rows  {told}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("accelerator.jsonl"))
    parser.add_argument("--table", type=Path, help="a Markdown file to write the table to as well")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(parts(FULL)))
    parser.add_argument("--seconds", type=float, default=480, help="of all parts together")
    for name, kind in (("--part", str), ("--call", int), ("--at-once", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
