"""lm-evaluation-harness through the server, next to the same model in one process.

  python benchmarks/serving/harness.py DATA_FOLDER [--limit 200] [--model NAME] [--concurrent 8]

DATA_FOLDER is that of harness_tasks.py. The harness's own client `local-completions`, unmodified,
scores LAMBADA and writes texts up to a stop string; so does our backend of the harness. Exits with
1 where a log-likelihood differs by more than 1e-4, or an accuracy or a text at all.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from servers import ours

from neo_jax.evaluation import tasks
from neo_jax.evaluation.harness import NeoLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness_tasks import quiet, write_tasks


def answers(results: dict, name: str) -> list:
    """What the model answered, example by example."""
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for request in sample["resps"] for answer in request]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--concurrent", type=int, default=8)
    args = parser.parse_args()
    quiet()
    good = True
    with tempfile.TemporaryDirectory() as scratch, ours("--model", args.model) as server:
        folder = Path(scratch)
        most = {"lambada": args.limit, "completion": min(args.limit, 50)}
        write_tasks(args.data, folder, most)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        client = LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=args.model,
            tokenizer_backend="remote",
            num_concurrent=args.concurrent,
            batch_size=4,
        )
        here = NeoLM(args.model, cache="none")
        for name in most:
            one = {"tasks": [name], "task_manager": manager, "bootstrap_iters": 0}
            served = simple_evaluate(client, **one)
            local = tasks.run(here, [name], manager)
            mine, other = answers(served, name), answers(local, name)
            if name == "completion":
                same = sum(a == b for a, b in zip(mine, other, strict=True))
                good &= same == len(mine)
                words = f"{same} of {len(mine)} texts equal"
            else:
                gap = np.abs(np.array([a - b for (a, _), (b, _) in zip(mine, other, strict=True)]))
                greedy = sum(a[1] == b[1] for a, b in zip(mine, other, strict=True))
                good &= bool(gap.max() <= 1e-4) and greedy == len(mine)
                words = f"{len(mine)} log-likelihoods, largest difference {gap.max():.1e}"
                words += f"; {greedy} agree on whether they are greedy"
            figures = [
                f"{metric.split(',')[0]} {value:.6g} / {local['results'][name][metric]:.6g}"
                for metric, value in served["results"][name].items()
                if isinstance(value, float) and "stderr" not in metric
            ]
            print(f"{name}: {words}; served / here: {', '.join(figures)}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
