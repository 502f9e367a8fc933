"""Training steps and predictions of one classifier, here and in transformers, taking turns.

  python benchmarks/classify_speed.py [--size tiny|125m] [--rounds 3] [--output FILE.json]

Both train GPT-Neo with a head of two labels in float32 by AdamW, on a CPU, on texts of lengths as
SST-2 has them. Here, as `neo-jax train` does, batches hold texts of like length and are padded to a
power of two; there, as in run_glue.py with dynamic padding, batches are as they come and padded to
their longest text. The figure is examples a second.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from neo_jax.checkpoints.open_model import read_config
from neo_jax.data.labelled import LabelledDataset, labelled_batches
from neo_jax.labels import HeadConfig
from neo_jax.model.scan import unstack
from neo_jax.model.transformer import Neo
from neo_jax.text.classify import sequence_logits
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.initial_state import load_stacked
from neo_jax.training.objectives.classification import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import make_step, state_of

SIZES = {
    "tiny": {"hidden_size": 256, "num_layers": 6, "num_heads": 8, "vocab_size": 4096},
    "125m": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 50257},
}
ROWS = 16


def make_data(vocab):
    """Returns texts of random ids and labels as a data set."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4.0, 6.5, 512).round().astype(int), 3, 64)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, vocab - 1, offsets[-1]).astype(np.uint16)
    labels = rng.integers(0, 2, len(lengths)).astype(np.int32)
    head = HeadConfig("score", ("no", "yes"))
    return LabelledDataset(tokens, offsets, labels, 64, head, vocab, Path())


def theirs_of(folder):
    """Returns functions that train and predict in transformers."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

    def train(tokens, mask, labels):
        loss = model(tokens, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def predict(tokens, mask):
        model.eval()
        with torch.inference_mode():
            found = model(tokens, attention_mask=mask).logits
        model.train()
        return found

    return train, predict


def main():
    """Prints and writes examples a second of both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    shape = SIZES[options.size]
    pad = shape["vocab_size"] - 1
    config = transformers.GPTNeoConfig(
        **shape, attention_types=[[["global", "local"], shape["num_layers"] // 2]],
        num_labels=2, pad_token_id=pad, eos_token_id=pad,
    )  # fmt: skip
    dataset = make_data(shape["vocab_size"])
    texts = [row.tolist() for row in np.split(dataset.tokens, dataset.offsets[1:-1])]

    def padded(rows):
        width = max(len(texts[i]) for i in rows)
        tokens = np.full((len(rows), width), pad)
        for row, i in zip(tokens, rows, strict=True):
            row[: len(texts[i])] = texts[i]
        return torch.tensor(tokens), torch.tensor((tokens != pad).astype(int))

    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        train_theirs, predict_theirs = theirs_of(folder)
        ours = TrainConfig(
            data="", output="", steps=1000, batch_size=ROWS, model=read_config(folder), length=64,
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=0), dtype="float32",
        )  # fmt: skip
        model = Neo(ours.model)
        optimizer = make_optimizer(ours.optimizer, ours.steps)
        step = make_step(model, optimizer, ours)
        state = state_of(load_stacked(model, Path(folder), np.float32), optimizer)
    stream = labelled_batches(dataset, batch_size=ROWS, seed=0)
    batches = [Batch(**next(stream)) for _ in range(32)]
    order = np.random.default_rng(0).permutation(512).reshape(-1, ROWS)
    for width in (16, 32, 64):  # compiled before the clock runs
        found = [batch for batch in batches if batch.tokens.shape[1] == width]
        for batch in found[:1]:
            state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    train_theirs(*padded(order[0]), torch.tensor(dataset.labels[order[0]]).long())
    params = jax.tree.map(lambda leaf: leaf + 0, unstack(state.params, ours.model))
    sequence_logits(model, params, texts[:256], 32)
    results = {
        name: [] for name in ("train ours", "train theirs", "predict ours", "predict theirs")
    }

    def timed(name, count, work):
        begun = time.perf_counter()
        work()
        results[name].append(count / (time.perf_counter() - begun))

    for turn in range(options.rounds):
        here = range(turn * options.steps, (turn + 1) * options.steps)

        def train_ours(here=here):
            nonlocal state
            for i in here:
                state, found = step(state, batches[i % len(batches)])
            jax.block_until_ready(found)

        def train_them(here=here):
            for i in here:
                rows = order[i % len(order)]
                train_theirs(*padded(rows), torch.tensor(dataset.labels[rows]).long())

        def predict_them():
            for start in range(0, 256, 32):
                predict_theirs(*padded(range(start, start + 32)))

        timed("train ours", ROWS * options.steps, train_ours)
        timed("train theirs", ROWS * options.steps, train_them)
        timed("predict ours", 256, lambda: sequence_logits(model, params, texts[:256], 32))
        timed("predict theirs", 256, predict_them)
        print({name: round(values[-1], 1) for name, values in results.items()}, flush=True)
    ratios = {
        kind: float(np.median(np.divide(results[f"{kind} ours"], results[f"{kind} theirs"])))
        for kind in ("train", "predict")
    }
    print("ratio, ours over theirs:", ratios)
    if options.output:
        fields = {"size": options.size, "ratio": ratios, "examples_per_second": results}
        options.output.write_text(json.dumps(fields, indent=1) + "\n")


if __name__ == "__main__":
    main()
