"""GLUE and SuperGLUE: a model fine-tuned on every task at hand, over several seeds, or only asked.

A run leaves in its folder for each task the data and for each seed what training leaves, without
weights; scores.json, and where there is a test set a file for the benchmark's server. What has
scores is not done again.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neo_jax.checkpoints.options import LoadOptions
from neo_jax.data.examples import Example
from neo_jax.data.prepare_labelled import encode_labels, write_labelled
from neo_jax.data.tokenizing import is_held_out
from neo_jax.data.writer import HELD_OUT, TRAIN
from neo_jax.devices.processes import barrier, is_leader, say
from neo_jax.errors import NeoError
from neo_jax.evaluation.glue_tasks import TASKS, Row, find_splits, read_rows, submission
from neo_jax.evaluation.tune_options import TuneOptions
from neo_jax.files.paths import is_file, make_path, write_whole
from neo_jax.labels import HeadConfig
from neo_jax.model.soft_prompt import text_context
from neo_jax.text.classify import choose
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.load import load
from neo_jax.text.tokenizer import find_tokenizer
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.loop import train
from neo_jax.training.metrics import METRICS, predictions
from neo_jax.transforms.lora import LoraConfig

_HELD_OUT = 0.3  # of a development set that is all there is


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What became of a task: the metrics of each seed, from 0 to 1 or -1 to 1."""

    task: str
    num_train: int  # 0 where the model was only asked
    num_dev: int
    scores: tuple[Mapping[str, float], ...]
    is_divided: bool = False  # whether both are parts of the development set, which is all there is

    def mean(self, metric: str) -> float:
        """Returns the mean over the seeds."""
        return float(np.mean([each[metric] for each in self.scores]))

    def deviation(self, metric: str) -> float | None:
        """Returns the standard deviation over the seeds, None of one."""
        values = [each[metric] for each in self.scores]
        return float(np.std(values, ddof=1)) if len(values) > 1 else None


def fine_tune(
    task: str, data: str, output: Path, options: TuneOptions, model: LoadOptions, limit: int = 0
) -> TaskResult:
    """Fine-tunes a model on a task with each seed.

    Args:
      task: its name.
      data: the folder of the benchmark, or "hub".
      output: a folder for the task.
      options: how.
      model: where to start, and the mesh.
      limit: examples of each split at most; 0 is all.

    Raises:
      NeoError: the data cannot be read, or a run cannot be, or was interrupted.
    """
    spec, (rows, is_divided) = TASKS[task], _read(task, data, limit)
    head = HeadConfig("score", spec.labels, spec.problem_type)
    if not (output / "data").exists() and is_leader():
        tokenizer = find_tokenizer(model.model or "bundled")
        splits = {TRAIN: rows["train"], HELD_OUT: rows["dev"]}
        examples = {name: [*map(_example, each)] for name, each in splits.items()}
        write_labelled(output / "data", tokenizer, head, examples)
    barrier("prepared")
    scores = []
    for seed in range(options.seeds):
        folder = output / f"seed-{seed}"
        if not is_file(folder / "scores.json"):
            say(f"{spec.title}, seed {seed}")
            config = _config(task, len(rows["train"]), output, seed, options, model)
            train(config)
            if not is_file(folder / "model" / "config.json"):
                raise NeoError(f"{spec.title}: interrupted; the same command goes on from there.")
            _judge(task, rows, folder, model, options)
        scores.append(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    return TaskResult(task, len(rows["train"]), len(rows["dev"]), tuple(scores), is_divided)


def ask(
    lm: LanguageModel, task: str, data: str, shots: int, seeds: int, limit: int = 0
) -> TaskResult:
    """Asks a language model, without training, what the likeliest answer is.

    Args:
      lm: the model.
      task: its name.
      data: the folder of the benchmark, or "hub".
      shots: examples before each question, as many as fit; each seed draws others.
      seeds: how many times, where there are shots.
      limit: examples at most; 0 is all.

    Raises:
      NeoError: the data cannot be read, or the task is no question.
    """
    spec = TASKS[task]
    if not spec.template:
        raise NeoError(f"{spec.title} cannot be asked: its labels are numbers.")
    rows, _ = _read(task, data, limit)
    head, scores = HeadConfig("score", spec.labels, spec.problem_type), []
    for seed in range(seeds if shots else 1):
        before = _shots(task, rows["train"], shots, seed)
        scores.append(measure_task(task, rows["dev"], _likelihoods(lm, task, rows, before), head))
    return TaskResult(task, 0, len(rows["dev"]), tuple(scores))


def measure_task(
    task: str, rows: Sequence[Row], logits: np.ndarray, head: HeadConfig
) -> dict[str, float]:
    """Returns the official metrics of a task, and the accuracy, of logits [N, C] of its rows."""
    labels = encode_labels([row.label for row in rows], head)
    found, spec = predictions(logits, head), TASKS[task]
    names = spec.metrics if spec.problem_type == "regression" else (*spec.metrics, "accuracy")
    scores = {}
    for name in dict.fromkeys(names):
        if name in METRICS:
            scores[name] = METRICS[name](labels, found)
            continue
        right = []
        for places in _groups(rows):
            if name == "choices":  # of each question the likeliest choice
                right.append(labels[_likeliest(places, logits)] == 1)
            else:  # exact_match: all answers to a question
                right.append(bool(np.all(labels[places] == found[places])))
        scores[name] = float(np.mean(right))
    return scores


def _groups(rows: Sequence[Row]) -> list[list[int]]:
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    return [*groups.values()]


def _read(task: str, data: str, limit: int) -> tuple[dict[str, list[Row]], bool]:
    """Returns the rows of each split, and whether train and dev had to be made of one."""
    files = find_splits(task, data)
    rows = {split: read_rows(task, names[0]) for split, names in files.items()}
    is_divided = len({"train", "dev"} & rows.keys()) == 1
    if is_divided:
        all_rows = rows.pop("train", []) or rows.pop("dev")
        held_out = [is_held_out(row.text, _HELD_OUT) for row in all_rows]
        for split, wanted in (("train", False), ("dev", True)):
            pairs = zip(all_rows, held_out, strict=True)
            rows[split] = [row for row, held in pairs if held is wanted]
    for split in ("train", "dev"):
        if any(row.label is None for row in rows[split]):
            raise NeoError(f"{TASKS[task].title}: examples of {split} have no label.")
    return {split: each[: limit or None] for split, each in rows.items()}, is_divided


def _example(row: Row) -> Example:
    assert row.label is not None
    return Example(row.text, row.label)


def _config(
    task: str, count: int, output: Path, seed: int, options: TuneOptions, model: LoadOptions
) -> TrainConfig:
    steps = options.epochs * -(-count // options.train_batch_size)
    metric = next((name for name in TASKS[task].metrics if name in METRICS), "accuracy")
    return TrainConfig(
        data=str(output / "data"),
        output=str(output / f"seed-{seed}"),
        steps=0,
        epochs=options.epochs,
        batch_size=options.train_batch_size,
        pretrained=model.model or "bundled",
        lora=LoraConfig(rank=options.lora_rank),
        length=options.length,
        seed=seed,
        dtype=options.train_dtype,
        dropout=options.dropout,
        metric=metric,
        mesh=model.mesh,
        rules=model.rules,
        save_every=10**9,
        keep=1,
        optimizer=OptimizerConfig(
            learning_rate=options.learning_rate,
            schedule="linear",
            warmup_steps=steps // 16,
            final_fraction=0.0,
            beta2=0.999,
        ),
    )


def _judge(
    task: str,
    rows: Mapping[str, Sequence[Row]],
    folder: Path,
    model: LoadOptions,
    options: TuneOptions,
) -> None:
    """Writes what a trained classifier gives, and removes its weights."""
    place: dict[str, Any] = {"mesh": model.mesh, "rules": model.rules}
    lm = load(folder / "model", dtype=options.train_dtype, **place)
    head = lm.config.head

    def logits(split: str) -> np.ndarray:
        ids = [lm.encode(row.text)[: options.length] for row in rows[split]]
        return np.array([each.logits for each in lm.classify(ids)])

    scores = measure_task(task, rows["dev"], logits("dev"), head)
    text = None
    if "test" in rows:
        of_test = logits("test")
        is_choice = "choices" in TASKS[task].metrics
        found = _one_of_each(rows["test"], of_test) if is_choice else predictions(of_test, head)
        text = submission(task, rows["test"], found.tolist())
    if is_leader():
        if text:
            (folder / "submission").mkdir(exist_ok=True)
            write_whole(folder / "submission" / text[0], text[1])
        write_whole(folder / "scores.json", json.dumps(scores) + "\n")
        for name in () if options.keep_models else ("model", "adapter", "checkpoints"):
            shutil.rmtree(folder / name, ignore_errors=True)
    barrier("judged")


def _one_of_each(rows: Sequence[Row], logits: np.ndarray) -> np.ndarray:
    """Returns 1 for the likeliest choice of each question, 0 for the others."""
    found = np.zeros(len(rows), int)
    for places in _groups(rows):
        found[_likeliest(places, logits)] = 1
    return found


def _likeliest(places: Sequence[int], logits: np.ndarray) -> int:
    """Returns the row that is likeliest to be the right choice, of those of a question."""
    return places[int(np.argmax(logits[places, 1] - logits[places, 0]))]


def _shots(task: str, rows: Sequence[Row], count: int, seed: int) -> list[str]:
    """Returns questions with their right answers."""
    spec, order = TASKS[task], np.random.default_rng(seed).permutation(len(rows))
    if spec.answers:
        picked = [rows[i] for i in order[:count]]
        return [row.prompt + spec.answers[spec.labels.index(str(row.label))] for row in picked]
    right = [rows[i] for i in order if rows[i].label == "right"]
    return [row.prompt + row.choice for row in right[:count]]


def _likelihoods(
    lm: LanguageModel, task: str, rows: Mapping[str, Sequence[Row]], before: Sequence[str]
) -> np.ndarray:
    """Returns log p of each answer to each row, [N, C]; of a choice that is a row, in column 1."""
    spec, context = TASKS[task], text_context(lm.model)
    prompts: list[list[int]] = []
    choices: list[list[list[int]]] = []
    for row in rows["dev"]:
        answers = [lm.encode(answer) for answer in spec.answers or (row.choice,)]
        prompts.append(_fitting(lm, row.prompt, before, context - max(map(len, answers))))
        choices.append(answers)
    found = choose(lm.model, lm.params, prompts, choices)
    return np.array([each if spec.answers else [0.0, *each] for each in found])


def _fitting(lm: LanguageModel, prompt: str, before: Sequence[str], room: int) -> list[int]:
    """Returns a prompt behind as many examples as fit; of one that does not fit alone the end."""
    for first in range(len(before) + 1):
        ids = lm.encode("\n\n".join([*before[first:], prompt]))
        if len(ids) <= room:
            return ids
    return ids[-room:]


def run(
    names: Sequence[str], data: str, output: str, options: TuneOptions, model: LoadOptions,
    shots: int = -1, limit: int = 0,
) -> Iterator[TaskResult]:  # fmt: skip
    """Yields the result of each task: fine-tuned, or with `shots` from 0 on only asked."""
    place: dict[str, Any] = {"mesh": model.mesh, "rules": model.rules}
    lm = load(model.model or None, dtype=model.dtype, **place) if shots >= 0 else None
    for name in names:
        if lm is None:
            folder = make_path(output) / name
            yield fine_tune(name, data, folder, options, model, limit)
        elif TASKS[name].template:
            yield ask(lm, name, data, shots, options.seeds, limit)
        else:
            say(f"{TASKS[name].title} is left out: its labels are numbers")
