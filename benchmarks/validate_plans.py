"""Plans against published runs: predicted step times and MFU next to the reported.

  python benchmarks/validate_plans.py              # by arithmetic, writes docs/validation.*
  python benchmarks/validate_plans.py --compile    # compiles those rows too that neo_jax can
  python benchmarks/validate_plans.py --fit        # fits what is not measured to the four rows

Each row is a run whose configuration and speed are published. Four of them fit what nobody has
measured: the share of the peak that products of long programs reach on three kinds of chips, and
the share of collectives' time that is waited for. No other figure is fitted, and none is of a row.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))

from benchmarks.marked_tables import fill  # noqa: E402
from benchmarks.published_runs import Row, rows  # noqa: E402
from neo_jax.cli import main as neo_jax  # noqa: E402
from neo_jax.devices.chips import CHIPS  # noqa: E402

DOCUMENT = ROOT / "docs" / "validation.md"
RESULTS = ROOT / "docs" / "validation.json"


def fitted() -> dict[str, float]:
    """Returns the four figures that make the four rows come out, each by halving an interval."""
    chosen = {row.fits: row for row in rows() if row.fits}

    def error(row: Row, share: float, waiting: float) -> float:
        chip = CHIPS[row.chip]
        reached = dataclasses.replace(chip.reached, products=share)
        step = row.predicted(dataclasses.replace(chip, reached=reached), waiting).step
        return step / row.reported - 1

    def share_of(name: str, waiting: float) -> float:
        return _root(lambda share: error(chosen[name], share, waiting), 0.3, 1.2)

    def left(waiting: float) -> float:
        return error(chosen["waiting"], share_of("products of v5e", waiting), waiting)

    waiting = _root(left, 0.0, 1.0)
    names = [name for name in chosen if name != "waiting"]
    return {"waiting": waiting, **{name: share_of(name, waiting) for name in names}}


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(40):
        middle = (low + high) / 2
        if function(low) * function(middle) <= 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def describe(row: Row) -> dict[str, Any]:
    """Returns a row as fields for JSON."""
    prediction, chip = row.predicted(), CHIPS[row.chip]
    fields = {
        "model": row.model,
        "chip": row.chip,
        "slice": row.name,
        "devices": row.devices,
        "parameters": row.shape.params,
        "mesh": row.mesh,
        "sequences_a_device": row.rows,
        "length": row.setup.length,
        "remat": row.remat,
        "reported_seconds": row.reported,
        "predicted_seconds": prediction.step,
        "error": prediction.step / row.reported - 1,
        "reported_mfu": row.flops / row.reported / chip.peak_flops,
        "predicted_mfu": row.flops / prediction.step / chip.peak_flops,
        "parts": {name: seconds / prediction.step for name, seconds in prediction.parts.items()},
        "fits": row.fits or None,
        "source": row.source,
    }
    if row.command:
        fields["compiled"] = _compiled().get(row.command)
    return fields


def _compiled() -> dict[str, Any]:
    """Returns what the compiler said of rows, by their commands, as it was written before."""
    if not RESULTS.exists():
        return {}
    written = json.loads(RESULTS.read_text())["rows"]
    return {row["compiled"]["command"]: row["compiled"] for row in written if row.get("compiled")}


def compile_row(row: Row) -> dict[str, Any]:
    """Returns what `neo-jax plan` predicts of a row whose block is ours.

    Where its command leaves the layers open, the whole may need more memory than there is. Its
    layers are a loop: two programs of few layers lie on a line, and so does the whole.
    """
    start = time.process_time()
    depths = _DEPTHS if "{layers}" in row.command else (row.shape.num_layers,)
    times = [_compiled_seconds(row.command.format(layers=layers)) for layers in depths]
    slope = (times[-1] - times[0]) / (depths[-1] - depths[0]) if len(times) > 1 else 0.0
    seconds = times[-1] + (row.shape.num_layers - depths[-1]) * slope
    return {
        "command": row.command,
        "jax": jax.__version__,
        "layers": list(depths),
        "predicted_seconds": seconds,
        "error": seconds / row.reported - 1,
        "cpu_seconds": time.process_time() - start,
    }


_DEPTHS = (8, 16)


def _compiled_seconds(command: str) -> float:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = neo_jax(["plan", *command.split(), "--json"])
    plan: dict[str, Any] = {} if status else json.loads(out.getvalue())
    if not plan.get("fits"):
        raise SystemExit(f"neo-jax plan {command} failed, or does not fit.")
    return plan["predicted"]["ms"]["step"] / 1e3


def table(found: Sequence[dict[str, Any]]) -> str:
    """Returns rows as Markdown."""
    head = ["model", "slice", "mesh", "sequences a device", "remat", "step, s: predicted"]
    head += ["reported", "MFU: predicted", "reported", "error"]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in found:
        mark = " *" if row["fits"] else ""
        cells = [
            f"[{row['model']}]({row['source']}){mark}",
            row["slice"],
            row["mesh"],
            f"{row['sequences_a_device']:g} x {row['length']}",
            row["remat"],
            f"{row['predicted_seconds']:.3f}",
            f"{row['reported_seconds']:.3f}",
            f"{row['predicted_mfu']:.1%}",
            f"{row['reported_mfu']:.1%}",
            f"{row['error']:+.1%}",
        ]
        lines.append(_line(cells))
        if row.get("compiled"):
            other = row["compiled"]
            predicted = f"{other['predicted_seconds']:.3f}"
            share = row["reported_mfu"] / (1 + other["error"])
            cells = ["the same, compiled", *[""] * 4, predicted, "", f"{share:.1%}", ""]
            lines.append(_line([*cells, f"{other['error']:+.1%}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def summary(found: Sequence[dict[str, Any]]) -> str:
    """Returns the errors of rows that fitted nothing, in a sentence."""
    others = [row for row in found if not row["fits"]]
    errors = sorted(abs(row["error"]) for row in others)
    within = sum(error <= 0.1 for error in errors)
    worst = max(others, key=lambda row: abs(row["error"]))
    compiled = [row["compiled"]["error"] for row in found if row.get("compiled")]
    also = (
        f" The {len(compiled)} runs whose block is ours, compiled as we train it, are off by "
        + ", ".join(f"{error:+.1%}" for error in compiled)
        + "."
    )
    return (
        f"Of {len(errors)} runs that fitted nothing the median error of the step time is "
        f"{statistics.median(errors):.1%}; {within} are within 10 %; the largest error is "
        f"{worst['error']:+.1%} ({worst['model']} on {worst['slice']})." + also * bool(compiled)
    )


def write(found: Sequence[dict[str, Any]]) -> None:
    """Writes the JSON, and puts table and summary into the document behind their marks."""
    fields = {"fitted": fitted(), "summary": summary(found), "rows": list(found)}
    RESULTS.write_text(json.dumps(fields, indent=1) + "\n")
    fill(DOCUMENT, {"summary": summary(found), "rows": table(found)})


def main() -> None:
    """Predicts every row, and writes what came out."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="the rows whose blocks are ours")
    parser.add_argument("--again", action="store_true", help="compile rows that were, too")
    parser.add_argument("--fit", action="store_true", help="print the figures that the rows fit")
    args = parser.parse_args()
    if args.fit:
        print(json.dumps(fitted(), indent=1))
        return
    found = [describe(row) for row in rows()]
    for row, fields in zip(rows(), found, strict=True):
        if args.compile and row.command and (args.again or not fields["compiled"]):
            fields["compiled"] = compile_row(row)
            write(found)  # what is done is done
        print(f"{row.model:16} {row.name:12} {fields['error']:+.1%}", flush=True)
    write(found)
    print(summary(found))


if __name__ == "__main__":
    main()
