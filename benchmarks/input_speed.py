"""What the data costs a training step: its tokens/s by the real path over those by one batch.

  python benchmarks/input_speed.py [--rounds 5] [--models small large] [--json]

The real path is a data set on disk, prepared in a temporary folder from
tests/corpora/corpus.jsonl.xz; grain, which shuffles it; and the way onto the device. Blocks of
steps take turns in one process, and each figure is the median over rounds: above 0.97 is the goal.
"apart" is with attention that ends at each document, on both sides. Wants a quiet machine.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from neo_jax.config import ModelConfig
from neo_jax.data.feed import batches
from neo_jax.data.mixture import Mixture
from neo_jax.data.prepare import prepare
from neo_jax.model.transformer import Neo
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import Placement
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import abstract_inputs, init_state, make_step

CORPUS = Path(__file__).parents[1] / "tests" / "corpora" / "corpus.jsonl.xz"
SMALL = TrainConfig(
    data="",
    output="",
    steps=10**6,
    batch_size=8,
    model=ModelConfig(
        num_layers=2,
        embed_dim=64,
        num_heads=2,
        vocab_size=4096,
        max_length=256,
        window_size=64,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(warmup_steps=0),
)
MODELS = {  # and the steps of a block, many more than the batches that are read ahead
    "small": (SMALL, 100),
    "large": (
        dataclasses.replace(
            SMALL,
            batch_size=2,
            model=dataclasses.replace(
                SMALL.model, num_layers=4, embed_dim=512, num_heads=8, head_dim=64, max_length=512
            ),
        ),
        30,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        prepare([CORPUS], data, train_tokenizer=4096, progress=False)
        for model, across in itertools.product(args.models, (True, False)):
            config, count = MODELS[model]
            config = dataclasses.replace(config, data=str(data), across_documents=across)
            name = model if across else f"{model}, apart"
            result = results[name] = measure(config, count, args.rounds)
            if not args.json:
                print(f"{name:<13}", "  ".join(f"{k} {v:.4g}" for k, v in result.items()))
    if args.json:
        print(json.dumps(results, indent=2))


def measure(config, count, rounds):
    """Returns the ratio of both sides' tokens/s, and each."""
    model = Neo(config.model, jnp.dtype(config.dtype))
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_step = make_step(model, optimizer, config)
    state = init_state(model, optimizer, config.seed)
    dataset = Mixture.open(
        config.data, length=config.sequence_length, across_documents=config.across_documents
    )
    place = Placement(model, abstract_inputs(config, model, dataset.has_segment_starts)[0])
    feed = batches(dataset, batch_size=config.batch_size, seed=config.seed)
    constant = place(next(feed))

    def block(next_batch):
        nonlocal state
        start = time.perf_counter()
        for _ in range(count):
            state, _ = train_step(state, next_batch())
        jax.block_until_ready(state)
        return count * config.batch_size * config.sequence_length / (time.perf_counter() - start)

    sides = {"fed": lambda: place(next(feed)), "constant": lambda: constant}
    speeds = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name in list(sides)[:: 1 if round_ % 2 else -1]:
            speed = block(sides[name])
            if round_:  # the first is for compiling and warming up
                speeds[name].append(speed)
    ratios = [fed / same for fed, same in zip(*speeds.values(), strict=True)]
    return {"ratio": statistics.median(ratios)} | {
        f"{name} tokens/s": statistics.median(each) for name, each in speeds.items()
    }


if __name__ == "__main__":
    main()
