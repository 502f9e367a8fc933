"""`plan --search` against compiling every choice: is its winner among the three fastest?

  python benchmarks/search_check.py docs/search_check.json [--seconds 200]

Every mesh of four v5e chips with every remat, of GPT-Neo 125M at a batch of four sequences, without
accumulation; attention's blocks as usual. A row is one compiled choice, the best on paper first.
Those that are there are not compiled again; after `--seconds` it compiles no more, to be continued.
What is said is of those that were compiled.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from neo_jax.config import preset
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.estimate import Choice
from neo_jax.tools.plan.plan import make_plan
from neo_jax.tools.plan.search import Candidate, search_training
from neo_jax.tools.plan.steps import Step, training_step
from neo_jax.tools.plan.topology import Topology, find_topology
from neo_jax.training.config import TrainConfig

TOPOLOGY = "v5e:2x2"
CONFIG = TrainConfig("", "", 1, 4, model=preset("gpt-neo-125m"), dtype="bfloat16", kernel="splash")
COMPILED = 3  # as `plan --search` does


def build(choice: Choice, topology: Topology) -> Step:
    """Returns the step of a choice."""
    sharding = make_sharding(choice.mesh, choice.rules, topology.devices)
    assert sharding is not None
    return training_step(choice.applied(CONFIG), sharding)


def measure(choice: Choice, topology: Topology) -> dict[str, Any]:
    """Returns what the compiler says of a choice."""
    try:
        plan = make_plan(build(choice, topology), topology)
    except NeoError as error:
        return {"options": choice.options, "refused": str(error)}
    return {
        "options": choice.options,
        "fits": plan.fits,
        "memory": plan.memory.total,
        "ms": 1e3 * plan.prediction.step if plan.prediction else None,
    }


def summary(
    rows: list[dict[str, Any]], paper: list[Candidate], topology: Topology
) -> dict[str, Any]:
    """Returns where the winner of a search stands, and how far arithmetic is off."""
    found = search_training(CONFIG, lambda choice: build(choice, topology), topology, COMPILED)
    winner = found[0].choice
    assert winner is not None
    compiled = {row["options"]: row for row in rows if row.get("fits")}
    fastest = sorted(compiled, key=lambda name: compiled[name]["ms"])
    known = {each.choice.options: each for each in paper if each.choice}
    both = [(known[name], row) for name, row in compiled.items()]
    return {
        "choices": len(paper),
        "compiled": len(rows),
        "fit": len(compiled),
        "winner": winner.options,
        "rank": fastest.index(winner.options) + 1,
        "slower_than_the_fastest": compiled[winner.options]["ms"] / compiled[fastest[0]]["ms"] - 1,
        "rank_of_the_first_on_paper": fastest.index(paper[0].choice.options) + 1,
        "median_error_of_time": statistics.median(
            abs(1e3 * one.seconds / row["ms"] - 1) for one, row in both
        ),
        "median_error_of_memory": statistics.median(
            abs(one.memory / row["memory"] - 1) for one, row in both
        ),
    }


def main() -> None:
    """Compiles what is missing; then compares."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    topology, end = find_topology(TOPOLOGY), time.monotonic() + args.seconds
    rows = json.loads(args.results.read_text())["rows"] if args.results.exists() else []
    done = {row["options"] for row in rows}
    every = search_training(CONFIG, lambda choice: build(choice, topology), topology, 0)
    paper = [each for each in every if each.choice and each.choice.accumulation == 1]
    for each in paper:
        assert each.choice is not None
        if each.choice.options in done or time.monotonic() > end:
            continue
        row = measure(each.choice, topology)
        rows.append(row | {"paper_ms": 1e3 * each.seconds, "paper_memory": each.memory})
        args.results.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)
    if len(rows) < len(paper):
        print(f"{len(paper) - len(rows)} are left, the worst on paper; run it again.")
    fields = {"topology": TOPOLOGY, "summary": summary(rows, paper, topology), "rows": rows}
    args.results.write_text(json.dumps(fields, indent=1) + "\n")
    print(json.dumps(fields["summary"], indent=1))


if __name__ == "__main__":
    main()
