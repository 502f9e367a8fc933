"""Labels of words and answers in texts: what the bundled model learns of lives that are made.

  python benchmarks/made_heads.py [--task words|answers] [--output FILE.json]

The lives are those of `neo-jax recipe questions`, two sentences each, 2,000 to learn from and 200
others to judge by; an eighth of the first is held out, by which the best epoch is chosen. Words are
tagged with what they are in a life: a place is where somebody was born or lived, as the words
before it say. Answers are asked for as in the recipe. Next to the model before and after stand
rules that know no context: the tag that a word has most often, and the place among the words of a
life at which answers to questions of a kind stand most often. What FILE.json has is not done again.
"""

import argparse
import collections
import dataclasses
import json
import tempfile
from pathlib import Path

import jax

import neo_jax
from neo_jax.data.examples import Schema
from neo_jax.data.prepare_labelled import prepare_labelled
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.evaluation.made_examples import make_rows
from neo_jax.labels import HeadConfig, unnamed
from neo_jax.model.heads import init_head
from neo_jax.text.language_model import LanguageModel
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import run as train_run
from neo_jax.training.metrics import entity_f1, measure_answers

TRAIN, TEST = 2000, 200
KINDS = {"birthplace": "BORN", "year": "YEAR", "trade": "TRADE", "home": "HOME"}


def lives(count, seed, without=()):
    """Returns made questions: for each the life, the question, the answer and its kind."""
    rows = make_rows("questions", count, seed, without)
    parts = [(*row.prompt.split("\nQuestion: "), row) for row in rows]
    return rows, [
        (life, asked.removesuffix("\nAnswer:"), row.completion.strip(), row.kind)
        for life, asked, row in parts
    ]


def tagged(life):
    """Returns the words of a life and their tags, which its wording gives away."""
    words = life.replace(".", " .").split()
    tags = ["O"] * len(words)
    tags[0], tags[1] = "B-PERSON", "I-PERSON"
    for i, word in enumerate(words):
        if word == "in" and words[i + 1].isdecimal():
            tags[i + 1] = "B-YEAR"
        elif word == "in":
            tags[i + 1] = "B-BORN" if words[i - 1] == "born" else "B-HOME"
        elif word == "as":
            tags[i + 1 : i + 3] = "B-TRADE", "I-TRADE"
    return words, tags


class Words:
    """Tags of the words of lives."""

    kind, epochs, rate = "classifier", 2, 3e-4

    def rows(self, examples):
        """Returns the rows of a file."""
        pairs = [tagged(life) for life, *_ in examples]
        return [{"tokens": words, "tags": tags} for words, tags in pairs]

    def measure(self, lm, examples):
        """Returns the F1 of entities that a model reaches."""
        pairs = [tagged(life) for life, *_ in examples]
        found = lm.classify_tokens([words for words, _ in pairs])
        said = [[word.label for word in text] for text in found]
        return {"entity_f1": entity_f1([tags for _, tags in pairs], said)}

    def rule(self, learned, examples):
        """Returns what the commonest tag of each word reaches."""
        counts = collections.defaultdict(collections.Counter)
        for life, *_ in learned:
            for word, tag in zip(*tagged(life), strict=True):
                counts[word][tag] += 1
        common = {word: each.most_common(1)[0][0] for word, each in counts.items()}
        pairs = [tagged(life) for life, *_ in examples]
        said = [[common.get(word, "O") for word in words] for words, _ in pairs]
        return {"entity_f1": entity_f1([tags for _, tags in pairs], said)}


class Answers:
    """Answers to questions about lives."""

    kind, epochs, rate = "qa_outputs", 4, 3e-4

    def rows(self, examples):
        """Returns the rows of a file, as SQuAD has them."""
        return [
            {
                "context": life,
                "question": question,
                "answers": {"text": [answer], "answer_start": [life.index(answer)]},
            }
            for life, question, answer, _ in examples
        ]

    def measure(self, lm, examples):
        """Returns SQuAD's metrics that a model reaches, and the exact matches of each kind."""
        found = lm.answers([(question, life) for life, question, *_ in examples])
        return self._scores(examples, [answer.text for answer in found])

    def rule(self, learned, examples):
        """Returns what the commonest place of answers to a kind of question reaches."""
        counts = collections.defaultdict(collections.Counter)
        for life, _, answer, kind in learned:
            before = life[: life.index(answer)].split()
            counts[kind][len(before), len(answer.split())] += 1
        said = []
        for life, _, _, kind in examples:
            first, number = counts[kind].most_common(1)[0][0]
            said.append(" ".join(life.split()[first : first + number]))
        return self._scores(examples, said)

    def _scores(self, examples, said):
        names = ("squad_f1", "squad_em")
        scores = measure_answers(names, [[answer] for _, _, answer, _ in examples], said)
        for kind in KINDS:
            pairs = [
                (a, text) for (_, _, a, k), text in zip(examples, said, strict=True) if k == kind
            ]
            answers, texts = zip(*pairs, strict=True)
            scores[kind] = measure_answers(("squad_em",), [[a] for a in answers], texts)["squad_em"]
        return scores


TASKS = {"words": Words(), "answers": Answers()}


def before(task, labels):
    """Returns the bundled model with a head that is drawn."""
    lm = neo_jax.load()
    config = dataclasses.replace(lm.config, head=HeadConfig(task.kind, labels))
    model = lm.model.clone(config=config)
    params = {name: tree for name, tree in lm.params.items() if name != "lm_head"}
    head = init_head(model, jax.random.key(0))
    return LanguageModel(model, params | head, lm.tokenizer, lm.folder)


def run(task, folder):
    """Returns what a rule and the model before and after reach, from 0 to 1."""
    rows, learned = lives(TRAIN, 0)
    _, examples = lives(TEST, 1, without=rows)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        lines = [json.dumps(row) + "\n" for row in task.rows(learned)]
        (folder / "train.jsonl").write_text("".join(lines), encoding="utf-8")
        prepare_labelled(
            [folder / "train.jsonl"], folder / "data", "bundled", Schema.usual(task.kind),
            held_out=0.125,
        )  # fmt: skip
    fields = json.loads((folder / "data" / "dataset.json").read_text(encoding="utf-8"))
    config = TrainConfig(
        data=str(folder / "data"), output=str(folder / "run"), pretrained="bundled", steps=0,
        epochs=task.epochs, batch_size=16, length=64, dtype="float32", log_every=20,
        save_every=50, keep=1,
        optimizer=OptimizerConfig(
            learning_rate=task.rate, schedule="linear", final_fraction=0.0, warmup_steps=20,
            beta2=0.999, weight_decay=0.01,
        ),
    )  # fmt: skip
    if not train_run(config).is_done:
        raise SystemExit("interrupted: the same command, with --folder, goes on from there")
    labels = tuple(fields["labels"]) if task.kind == "classifier" else unnamed(2)
    return {
        "epochs": task.epochs,
        "learning_rate": task.rate,
        "learned": fields["splits"]["train"]["examples"],
        "judged": len(examples),
        "rule": task.rule(learned, examples),
        "before": task.measure(before(task, labels), examples),
        "after": task.measure(neo_jax.load(folder / "run" / "model"), examples),
    }


def main():
    """Prints and writes what is reached."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--folder", type=Path, help="where runs are, to go on with them")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    enable_compilation_cache()
    results = {}
    if options.output and options.output.exists():
        results = json.loads(options.output.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.task] if options.task else TASKS:
            if name not in results:
                results[name] = run(TASKS[name], (options.folder or Path(folder)) / name)
            print(name, json.dumps(results[name], indent=1), flush=True)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
