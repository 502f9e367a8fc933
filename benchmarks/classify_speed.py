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
PREDICTED, PREDICTED_TOGETHER = 256, 32


def make_data(vocab):
    """Returns texts of random ids and labels as a data set."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.gamma(4.0, 6.5, 512).round().astype(int), 3, 64)
    offsets = np.cumsum([0, *lengths])
    tokens = rng.integers(0, vocab - 1, offsets[-1]).astype(np.uint16)
    labels = rng.integers(0, 2, len(lengths)).astype(np.int32)
    head = HeadConfig("score", ("no", "yes"))
    return LabelledDataset(tokens, offsets, labels, 64, head, vocab, Path())


class Theirs:
    """Training and predictions in transformers, of batches padded to their longest text."""

    def __init__(self, folder, dataset, texts):
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-5)
        self.labels, self.texts = torch.tensor(dataset.labels).long(), texts
        self.order = np.random.default_rng(0).permutation(len(texts)).reshape(-1, ROWS)

    def padded(self, rows):
        """Returns tokens and what of them is text."""
        pad, width = self.model.config.pad_token_id, max(len(self.texts[i]) for i in rows)
        tokens = np.full((len(rows), width), pad)
        for row, i in zip(tokens, rows, strict=True):
            row[: len(self.texts[i])] = self.texts[i]
        return torch.tensor(tokens), torch.tensor((tokens != pad).astype(int))

    def train(self, steps):
        """Takes some steps."""
        for i in steps:
            rows = self.order[i % len(self.order)]
            tokens, mask = self.padded(rows)
            loss = self.model(tokens, attention_mask=mask, labels=self.labels[rows]).loss
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

    def predict(self):
        """Labels `PREDICTED` texts."""
        self.model.eval()
        with torch.inference_mode():
            for start in range(0, PREDICTED, PREDICTED_TOGETHER):
                tokens, mask = self.padded(range(start, start + PREDICTED_TOGETHER))
                self.model(tokens, attention_mask=mask)
        self.model.train()


class Ours:
    """Training and predictions here."""

    def __init__(self, folder, dataset, texts):
        config = TrainConfig(
            data="", output="", steps=1000, batch_size=ROWS, model=read_config(folder), length=64,
            optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=0), dtype="float32",
        )  # fmt: skip
        self.model, self.texts = Neo(config.model), texts[:PREDICTED]
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.step = make_step(self.model, optimizer, config)
        self.state = state_of(load_stacked(self.model, Path(folder), np.float32), optimizer)
        stream = labelled_batches(dataset, batch_size=ROWS, seed=0)
        self.batches = [Batch(**next(stream)) for _ in range(32)]
        copied = jax.tree.map(lambda leaf: leaf + 0, self.state.params)  # a step consumes its state
        self.params = unstack(copied, config.model)

    def compile(self):
        """Runs every program once, before the clock runs."""
        for width in sorted({batch.tokens.shape[1] for batch in self.batches}):
            first = next(b for b in self.batches if b.tokens.shape[1] == width)
            self.state, metrics = self.step(self.state, first)
        jax.block_until_ready(metrics)
        self.predict()

    def train(self, steps):
        """Takes some steps."""
        for i in steps:
            self.state, metrics = self.step(self.state, self.batches[i % len(self.batches)])
        jax.block_until_ready(metrics)

    def predict(self):
        """Labels `PREDICTED` texts."""
        sequence_logits(self.model, self.params, self.texts, PREDICTED_TOGETHER)


def make_both(shape):
    """Returns both, with the same weights and data."""
    pad = shape["vocab_size"] - 1
    config = transformers.GPTNeoConfig(
        **shape, attention_types=[[["global", "local"], shape["num_layers"] // 2]],
        num_labels=2, pad_token_id=pad, eos_token_id=pad,
    )  # fmt: skip
    dataset = make_data(shape["vocab_size"])
    texts = [row.tolist() for row in np.split(dataset.tokens, dataset.offsets[1:-1])]
    with tempfile.TemporaryDirectory() as folder:
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        return Ours(folder, dataset, texts), Theirs(folder, dataset, texts)


def take_turns(ours, theirs, rounds, steps):
    """Returns examples a second of each, by what is done, a number a round."""
    results = {f"{kind} {who}": [] for kind in ("train", "predict") for who in ("ours", "theirs")}

    def timed(name, count, work, *args):
        begun = time.perf_counter()
        work(*args)
        results[name].append(count / (time.perf_counter() - begun))

    for turn in range(rounds):
        here = range(turn * steps, (turn + 1) * steps)
        timed("train ours", ROWS * steps, ours.train, here)
        timed("train theirs", ROWS * steps, theirs.train, here)
        timed("predict ours", PREDICTED, ours.predict)
        timed("predict theirs", PREDICTED, theirs.predict)
        print({name: round(values[-1], 1) for name, values in results.items()}, flush=True)
    return results


def main():
    """Prints and writes examples a second of both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    ours, theirs = make_both(SIZES[options.size])
    ours.compile()
    theirs.train([0])
    results = take_turns(ours, theirs, options.rounds, options.steps)
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
