"""SST-2's development set, divided: the fine-tuned bundled model next to a bag of words.

  python benchmarks/classify_sst2.py DEV.tsv [--seeds 5] [--output FILE.json]

DEV.tsv is the benchmark's, 872 examples. Each seed divides them anew, 70 % to learn from and 30 %
to judge by, and draws another head and order of batches. The bag of words is scikit-learn's
logistic regression on the presence of words and pairs of words. Neither looks at the 30 % before
the end: the number of epochs is fixed.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import neo_jax
from neo_jax.data.examples import Example
from neo_jax.data.prepare_labelled import write_labelled
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.evaluation.glue_tasks import TASKS, read_rows
from neo_jax.labels import HeadConfig
from neo_jax.text.tokenizer import find_tokenizer
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import train


def fine_tuned(train_rows, test_rows, seed, options, folder):
    """Returns the accuracy of the bundled model on what it has not seen."""
    head = HeadConfig("score", TASKS["sst2"].labels)
    examples = [Example(row.text, row.label) for row in train_rows]
    write_labelled(folder / "data", find_tokenizer("bundled"), head, {"train": examples})
    config = TrainConfig(
        data=str(folder / "data"), output=str(folder / "run"), pretrained="bundled", steps=0,
        epochs=options.epochs, batch_size=16, length=96, dtype="float32", seed=seed,
        log_every=1000, save_every=10**6,
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate, schedule="linear", final_fraction=0.0,
            warmup_steps=20, beta2=0.999, weight_decay=0.01,
        ),
    )  # fmt: skip
    train(config)
    lm = neo_jax.load(folder / "run")
    found = [each.label for each in lm.classify([row.text for row in test_rows])]
    return float(np.mean([label == row.label for label, row in zip(found, test_rows, strict=True)]))


def bag_of_words(train_rows, test_rows):
    """Returns the accuracy of a logistic regression."""
    words = CountVectorizer(binary=True, ngram_range=(1, 2), token_pattern=r"\S+")
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit([row.text for row in train_rows], [row.label for row in train_rows])
    return float(model.score([row.text for row in test_rows], [row.label for row in test_rows]))


def summarize(results, options):
    """Returns means and standard deviations over the seeds, and all of them."""
    fields = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    for name in ("fine_tuned", "bag_of_words"):
        values = [entry[name] for entry in results]
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        fields[name] = {"mean": float(np.mean(values)), "sd": deviation}
    return {**fields, "seeds": results}


def main():
    """Prints and writes accuracies by seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("dev", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    rows, results = read_rows("sst2", options.dev), []
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text())["seeds"]
    for seed in range(options.first, options.first + options.seeds):
        order = np.random.default_rng(seed).permutation(len(rows))
        cut = round(0.7 * len(rows))
        parts = [[rows[i] for i in part] for part in (order[:cut], order[cut:])]
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            ours = fine_tuned(*parts, seed, options, Path(folder))
        entry = {"seed": seed, "fine_tuned": ours, "bag_of_words": bag_of_words(*parts),
                 "seconds": round(time.perf_counter() - begun)}  # fmt: skip
        print(entry, flush=True)
        results.append(entry)
        if options.output:
            options.output.write_text(json.dumps(summarize(results, options), indent=1) + "\n")
    print(summarize(results, options))


if __name__ == "__main__":
    main()
