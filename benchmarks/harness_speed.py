"""Speed of lm-evaluation-harness's LAMBADA on a CPU, with our model and with its own; a ratio.

    python benchmarks/harness_speed.py DATA_FOLDER TOKENIZER_FOLDER [--examples 200]

DATA_FOLDER is that of harness_tasks.py, TOKENIZER_FOLDER holds GPT-2's tokenizer. GPT-Neo 125M in
shape, random weights, the same on both sides. Each side, in each dtype, takes the batch size that
is its fastest on a few examples; then all take turns in one process, with the tokens of all texts
to be found, and the first round, in which programs are compiled, left out. Ratios are medians over
rounds of their time over ours: above 1 we are faster; the bound is 1.5, in float32 and with each
side's fastest dtype. Wants a quiet machine.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness_tasks import quiet, write_fresh, write_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

import neo_jax
from neo_jax.config import preset
from neo_jax.evaluation.harness import NeoLM

BOUND = 1.5
SIDES = ("ours", "theirs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--trial", type=int, default=32, help="examples to choose batch sizes by")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 4, 8, 16, 32])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        requests = read_requests(args.data, folder, args.examples)
        tokenizer = write_fresh(folder / "model", preset("gpt-neo-125m"), args.tokenizer)
        makers = {
            (side, dtype): load(side, dtype, str(folder / "model"), tokenizer)
            for dtype in args.dtypes
            for side in SIDES
        }
    answers = [makers[side, args.dtypes[0]](1).loglikelihood(requests[:8]) for side in SIDES]
    gap = max(abs(ours - theirs) for (ours, _), (theirs, _) in zip(*answers, strict=True))
    print(f"log-likelihoods differ by {gap:.1e} in {args.dtypes[0]}", flush=True)
    trial = requests[:: max(1, len(requests) // args.trial)]
    models = {}
    for key, make in makers.items():
        sizes = trial_times({size: make(size) for size in args.batch_sizes}, trial)
        best = min(sizes, key=sizes.__getitem__)
        models[key] = make(best)
        tried = ", ".join(f"{size}: {seconds:.2f} s" for size, seconds in sizes.items())
        print(f"{' '.join(key):<16} batch size {best} ({tried})", flush=True)
    seconds = measure(models, requests, args.rounds)
    return tell(seconds, args.dtypes, len(requests))


def read_requests(data, folder, examples):
    """Returns the harness's requests of LAMBADA's first examples."""
    write_tasks(data, folder, {"lambada": examples})
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    task = manager.load(["lambada"])["tasks"]["lambada"]
    task.build_all_requests(rank=0, world_size=1)
    return task.instances


def load(side, dtype, folder, tokenizer):
    """Returns a function from a batch size to a model of the harness."""
    if side == "ours":
        lm = neo_jax.load(folder, dtype=dtype)
        return lambda size: NeoLM(lm, cache="none", batch_size=size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return lambda size: HFLM(model.eval(), tokenizer=tokenizer, device="cpu", batch_size=size)


def trial_times(models, requests):
    """Returns the least time of each of several models in turns, after a round to warm up."""
    rounds = [{key: timed(model, requests) for key, model in models.items()} for _ in range(3)]
    return {key: min(times[key] for times in rounds[1:]) for key in models}


def timed(model, requests):
    start = time.perf_counter()
    model.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - start


def measure(models, requests, rounds):
    """Returns the seconds of every round, of every side and dtype."""
    times = {key: [] for key in models}
    for round_ in range(rounds + 1):
        for key in list(models)[:: 1 if round_ % 2 else -1]:
            seconds = timed(models[key], requests)
            if round_:
                times[key].append(seconds)
    return times


def tell(seconds, dtypes, examples):
    """Prints ratios; returns 1 where one is below the bound."""
    median = {key: statistics.median(times) for key, times in seconds.items()}
    rows = {dtype: (dtype, dtype) for dtype in dtypes}
    fastest = [min(dtypes, key=lambda dtype, side=side: median[side, dtype]) for side in SIDES]
    rows[f"fastest ({' against '.join(fastest)})"] = tuple(fastest)
    good = True
    for label, (mine, other) in rows.items():
        ours, theirs = seconds["ours", mine], seconds["theirs", other]
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        good = good and (ratio >= BOUND or label not in ("float32", [*rows][-1]))
        speeds = [examples / statistics.median(times) for times in (ours, theirs)]
        print(f"{label:<32} {ratio:.2f} times  {speeds[0]:.2f} against {speeds[1]:.2f} examples/s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
