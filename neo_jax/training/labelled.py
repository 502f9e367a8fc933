"""What a run on examples with labels has of its own: the head, epochs, and its evaluation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from neo_jax.axes import Array, Params
from neo_jax.data.features import with_features
from neo_jax.data.labelled import (
    LabelledDataset,
    is_labelled,
    open_held_out,
    ordered_batches,
)
from neo_jax.data.mixture import Mixture
from neo_jax.devices.processes import say, to_host
from neo_jax.errors import NeoError, suggest
from neo_jax.labels import HeadConfig
from neo_jax.model.transformer import Neo
from neo_jax.text.spans import LONGEST_ANSWER, best_span
from neo_jax.text.tokenizer import load_tokenizer
from neo_jax.training.config import TrainConfig
from neo_jax.training.metrics import (
    known_metrics,
    measure,
    measure_answers,
    measure_words,
    usual_metrics,
)
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.classification import Batch, Classification
from neo_jax.training.report import Evaluation


def open_split(config: TrainConfig, split: str) -> Mixture | LabelledDataset:
    """Opens a split of a config's data, of texts or of examples with labels.

    Raises:
      NeoError: it cannot be opened.
    """
    if is_labelled(config.data):
        return _told(LabelledDataset.open(config.data, split, config.sequence_length), split)
    soft, first = config.soft_prompt, config.model.vocab_size
    virtual = [0] * soft.tokens if soft.features else range(first, first + soft.tokens)
    mixture = Mixture.open(
        config.data, split, config.sequence_length, config.across_documents, virtual
    )
    return with_features(mixture, soft.features) if soft.features and mixture.parts else mixture


def _told(dataset: LabelledDataset, split: str) -> LabelledDataset:
    """Returns a data set, and says which of its labels are not read."""
    if lost := dataset.num_lost:
        where = "labels of words of {} are beyond"
        if dataset.answers:
            where = "answers of {} are in no window of"
        say(f"{lost:,} {where.format(split)} length {dataset.length}, and not read; raise it")
    return dataset


def with_labels(config: TrainConfig, dataset: Mixture | LabelledDataset) -> TrainConfig:
    """Returns a config whose model has the head that its data is for, and whose run has steps.

    Examples with labels make the model a classifier, and texts a language model.

    Args:
      config: of the run.
      dataset: what it trains on, see `open_split`.

    Raises:
      NeoError: an option is not for such data.
    """
    labelled = isinstance(dataset, LabelledDataset)
    head = dataset.head if isinstance(dataset, LabelledDataset) else HeadConfig()
    if labelled and config.prompts:
        raise NeoError("a classifier continues no prompts; leave prompts out.")
    if labelled and config.soft_prompt.tokens:
        raise NeoError("a soft prompt is for a language model; train a classifier by lora.rank.")
    known = known_metrics(head)
    if config.metric and config.metric not in known:
        raise NeoError(f"no metric is called '{config.metric}'.{suggest(config.metric, known)}")
    if config.metric and not labelled:
        raise NeoError("metric is for data with labels; leave it out.")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, head=head))
    if not config.epochs:
        return config
    if isinstance(dataset, LabelledDataset):
        steps = dataset.steps(config.batch_size)
    else:
        steps = -(-sum(part.num_sequences for part in dataset.parts) // config.batch_size)
    return dataclasses.replace(config, steps=config.epochs * steps, epochs=0, eval_every=steps)


def is_exhausted(config: TrainConfig, step: int, best: int) -> bool:
    """Returns whether evaluations after the best one were as many as a run has patience for."""
    waited = config.patience * config.eval_every
    return bool(waited and best and step - best >= waited)


def metrics_of(config: TrainConfig) -> tuple[str, ...]:
    """Returns the metrics of a classifier, the one that its best epoch is chosen by first."""
    usual = usual_metrics(config.model.head)
    return tuple(dict.fromkeys([config.metric or usual[0], *usual]))


def make_evaluation(
    config: TrainConfig, model: Neo, objective: Classification, place: Any
) -> Callable[[Params], Evaluation] | None:
    """Returns what evaluates stacked parameters on the held-out examples; None without any."""
    dataset = open_held_out(config.data, config.sequence_length) if config.eval_every else None
    if dataset is None:
        return None
    _told(dataset, "held_out")
    names = metrics_of(config)

    @jax.jit
    def run(params: Params, batch: Batch) -> tuple[Sums, Array]:
        logits = objective.logits(model, params, batch)
        return objective.sums(logits, batch), logits

    def evaluate(params: Params) -> Evaluation:
        total = weight = 0.0
        found = [np.empty(0)] * dataset.num_examples
        for examples, batch in ordered_batches(dataset, config.batch_size, place.rows):
            sums, logits = run(params, place(batch))
            total, weight = total + float(sums.loss), weight + float(sums.weight)
            for example, row in zip(examples, to_host(logits), strict=False):
                found[example] = row.copy()
        return Evaluation(total / max(weight, 1), scores=_scores(names, dataset, found))

    return evaluate


def _scores(
    names: tuple[str, ...], dataset: LabelledDataset, logits: Sequence[np.ndarray]
) -> dict[str, float]:
    """Returns metrics by name, of the logits of each example of a data set."""
    head, labels = dataset.head, map(dataset.labels_of, range(dataset.num_examples))
    if head.kind == "score":
        return measure(names, dataset.labels, np.stack(logits), head)
    if head.kind == "classifier":
        texts = []
        for right, row in zip(labels, logits, strict=True):
            has_label = right >= 0
            texts.append((right[has_label], row[: len(right)].argmax(axis=1)[has_label]))
        return measure_words(names, texts, head)
    assert dataset.questions is not None
    answers, tokenizer = [], load_tokenizer(dataset.tokenizer_folder)
    allow_none = ("",) in dataset.answers
    ends = np.flatnonzero(np.diff(dataset.questions)) + 1
    for examples in np.split(np.arange(len(logits)), ends):  # the windows of a question
        first, answer = int(dataset.labels[examples[0], 2]), ""
        if first < dataset.length:  # some of the context is read
            read = [logits[i][: dataset.lengths[i]] for i in examples.tolist()]
            span = best_span(read, first, LONGEST_ANSWER, allow_none)
            begin = dataset.offsets[examples[span.window]]
            answer = tokenizer.decode([int(dataset.tokens[begin + i]) for i in span.tokens])
        answers.append(answer)
    return measure_answers(names, dataset.answers, answers)
