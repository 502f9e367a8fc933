"""SST-2's development set, divided: the fine-tuned bundled model next to a bag of words.

  python benchmarks/classify_sst2.py DEV.tsv [--seeds 5] [--output FILE.json]

DEV.tsv is the benchmark's, 872 examples. Each seed divides them anew, 70 % to learn from and 30 %
to judge by, and draws another head and order of batches. The bag of words is scikit-learn's
logistic regression on the presence of words and pairs of words; the features are hidden states of
the bundled model as it came, their mean weighted to the end, with a logistic regression on them.
None looks at the 30 % before the end: epochs, the layer and the penalty are fixed, the last two
chosen on ten other divisions. What FILE.json has is not done again.
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
from sklearn.preprocessing import StandardScaler

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


def by_features(train_rows, test_rows):
    """Returns the accuracy of a logistic regression on the mean hidden states of a text."""
    lm = neo_jax.load()
    train_features, test_features = (
        np.array(lm.embed([row.text for row in rows], layer=4, pooling="weighted"))
        for rows in (train_rows, test_rows)
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.003, max_iter=1000))
    model.fit(train_features, [row.label for row in train_rows])
    return float(model.score(test_features, [row.label for row in test_rows]))


def bag_of_words(train_rows, test_rows):
    """Returns the accuracy of a logistic regression."""
    words = CountVectorizer(binary=True, ngram_range=(1, 2), token_pattern=r"\S+")
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit([row.text for row in train_rows], [row.label for row in train_rows])
    return float(model.score([row.text for row in test_rows], [row.label for row in test_rows]))


METHODS = ("fine_tuned", "by_features", "bag_of_words")


def summarize(results, options):
    """Returns means and standard deviations over the seeds, and all of them."""
    fields = {"epochs": options.epochs, "learning_rate": options.learning_rate}
    for name in METHODS:
        values = [entry[name] for entry in results if name in entry]
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
    rows, entries = read_rows("sst2", options.dev), {}
    if options.output and options.output.exists():
        entries = {each["seed"]: each for each in json.loads(options.output.read_text())["seeds"]}
    for seed in range(options.first, options.first + options.seeds):
        order = np.random.default_rng(seed).permutation(len(rows))
        cut = round(0.7 * len(rows))
        parts = [[rows[i] for i in part] for part in (order[:cut], order[cut:])]
        entry = entries.setdefault(seed, {"seed": seed})
        if "fine_tuned" not in entry:
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                entry["fine_tuned"] = fine_tuned(*parts, seed, options, Path(folder))
            entry["seconds"] = round(time.perf_counter() - begun)
        for method in (by_features, bag_of_words):
            if method.__name__ not in entry:
                entry[method.__name__] = method(*parts)
        print(entry, flush=True)
        results = [entries[seed] for seed in sorted(entries)]
        if options.output:
            options.output.write_text(json.dumps(summarize(results, options), indent=1) + "\n")
    print(summarize(results, options))


if __name__ == "__main__":
    main()
