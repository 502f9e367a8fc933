"""A data set of examples with labels: on disk, and as batches of like length.

dataset.json             version, kind ("labelled"), head, dtype, vocab_size, eos_id, labels,
                         problem_type, statistics of every split
{train,held_out}/
  tokens.bin             ids, little-endian uint16 (uint32 for large vocabularies)
  offsets.npy            int64 [examples + 1]: where each example begins, and the end
  labels.npy             int32 [examples]; of a regression float32, of several labels an example
                         float32 [examples, labels] of ones and zeros; of a head `classifier`
                         int32 [tokens], -100 where a token has none, and of `qa_outputs` int32
                         [examples, 3], from the first token of the example: the first and the last
                         token of the answer, 0 where there is none, and the first of its context
  answers.json           of a head `qa_outputs`: the texts of the right answers to each question,
                         [""] where there is none
tokenizer.json, ...      the tokenizer

A batch is a function of the seed and the step. It is a dictionary, for R rows, of
  tokens:  int32 [R, T]; padding, on the right, is zeros
  lengths: int32 [R]
  labels:  as in labels.npy; of a head `classifier` int32 [R, T]; of `qa_outputs` int32 [R, 2],
           the first and the last token of the answer, 0 where what is read has none, or -100
           where nothing of the context is read
  weights: float32 [R]; 0 for a row that only fills a batch
"""

import dataclasses
import functools
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from neo_jax.data.writer import DATASET_FILE, HELD_OUT, OFFSETS_FILE, TOKENS_FILE, VERSION
from neo_jax.decode.capacity import padded_length
from neo_jax.errors import NeoError
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path
from neo_jax.labels import HeadConfig
from neo_jax.text.spans import NO_LABEL, windows

KIND = "labelled"
LABELS_FILE = "labels.npy"
ANSWERS_FILE = "answers.json"

_GROUPED = 50  # batches whose examples are sorted by length among themselves


def is_labelled(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a data set with labels."""
    path = make_path(folder) / DATASET_FILE
    return path.is_file() and read_json(path).get("kind") == KIND


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledDataset:
    """A split. Examples are read as far as `length` tokens.

    Of questions an example is a window: the question, and so many tokens of its context. There are
    several where the context is longer, see `text.spans.windows`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    length: int
    head: HeadConfig
    vocab_size: int
    tokenizer_folder: Path  # holds the tokenizer's files
    # To each question, where examples are windows of these; and the question of each window.
    answers: tuple[tuple[str, ...], ...] = ()
    questions: np.ndarray | None = None
    has_segment_starts: bool = False
    bytes_per_token: float = math.nan  # of texts that are predicted, of which there are none

    @classmethod
    def open(cls, folder: str | os.PathLike[str], split: str, length: int) -> "LabelledDataset":
        """Opens a split, "train" or "held_out".

        Raises:
          NeoError: no such split, files that do not match dataset.json, or a length that leaves no
            question room for its context.
        """
        folder = make_path(folder)
        fields = read_json(folder / DATASET_FILE)
        try:
            if fields["version"] != VERSION or split not in fields["splits"]:
                raise NeoError(f"{folder} has no split '{split}'; run neo-jax prepare again.")
            offsets, labels = (
                np.load(io.BytesIO((folder / split / name).read_bytes()))
                for name in (OFFSETS_FILE, LABELS_FILE)
            )
            data = (folder / split / TOKENS_FILE).read_bytes()
            tokens = np.frombuffer(data, fields["dtype"])
            kind = fields.get("head", "score")  # of files that do not say
            head = HeadConfig(kind, fields["labels"], fields["problem_type"])
            size = int(fields["vocab_size"])
            answers: tuple[tuple[str, ...], ...] = ()
            questions: np.ndarray | None = None
            if head.kind == "qa_outputs":
                text = (folder / split / ANSWERS_FILE).read_text(encoding="utf-8")
                answers = tuple(map(tuple, json.loads(text)))
            count = len(tokens) if head.kind == "classifier" else len(offsets) - 1
            if len(labels) != count or offsets[-1] != len(tokens) or len(answers) not in (0, count):
                raise ValueError("the files are not of one length")
            if head.kind == "qa_outputs":
                tokens, offsets, labels, questions = _windowed(tokens, offsets, labels, length)
        except NeoError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NeoError(f"{folder} is damaged ({error}); run neo-jax prepare again.") from error
        return cls(tokens, offsets, labels, length, head, size, folder, answers, questions)

    @property
    def num_examples(self) -> int:
        """Examples of the split."""
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens that are read of each example, int64 [examples]."""
        return np.minimum(np.diff(self.offsets), self.length)

    @property
    def mean_length(self) -> float:
        """Tokens that are read of an example."""
        return float(self.lengths.mean())

    def steps(self, batch_size: int) -> int:
        """Returns the batches of an epoch; the last one is filled up."""
        return -(-self.num_examples // batch_size)

    @property
    def num_lost(self) -> int:
        """Labels of words, or answers, that are not read, or not in one piece."""
        if self.questions is not None:
            there = np.flatnonzero([any(texts) for texts in self.answers])
            return len(np.setdiff1d(there, self.questions[self.labels[:, 1] > 0]))
        if self.head.kind != "classifier":
            return 0
        index = np.arange(len(self.tokens)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))
        return int(np.count_nonzero((index >= self.length) & (self.labels != NO_LABEL)))

    def labels_of(self, example: int) -> np.ndarray:
        """Returns the labels of what is read of an example, as a batch has them."""
        length = self.lengths[example]
        if self.head.kind == "classifier":
            start = self.offsets[example]
            return self.labels[start : start + length]
        if self.head.kind == "qa_outputs":
            return self.labels[example, :2]
        return self.labels[example]

    def batch(
        self, examples: np.ndarray, batch_size: int, rows: Sequence[int]
    ) -> dict[str, np.ndarray]:
        """Returns some rows of the batch of these examples, the rest of which is padding."""
        lengths = self.lengths[examples]
        width = padded_length(int(lengths.max()), self.length)
        labels = [self.labels_of(example) for example in examples]
        shape = (width,) if self.head.kind == "classifier" else labels[0].shape
        none = 0 if self.head.kind == "score" else NO_LABEL
        batch = {
            "tokens": np.zeros((batch_size, width), np.int32),
            "lengths": np.ones(batch_size, np.int32),
            "labels": np.full((batch_size, *shape), none, self.labels.dtype),
            "weights": np.zeros(batch_size, np.float32),
        }
        for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            start = self.offsets[example]
            batch["tokens"][row, :length] = self.tokens[start : start + length]
            # Of a text, or the first ones of its row.
            batch["labels"][row, ...][tuple(map(slice, labels[row].shape))] = labels[row]
        count = len(examples)
        batch["lengths"][:count] = lengths
        batch["weights"][:count] = 1
        return {name: array[list(rows)] for name, array in batch.items()}


def _windowed(
    tokens: np.ndarray, offsets: np.ndarray, labels: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns windows as examples: their tokens, offsets and labels, and the question of each.

    Where a question leaves no room for its context, a window is what is read of both.

    Raises:
      NeoError: all questions do.
    """
    rows, spans, questions = [], [], []
    for question, (start, last, first) in enumerate(labels.tolist()):
        ids = tokens[offsets[question] : offsets[question + 1]]
        for part in windows(len(ids), first, length) or [range(0)]:
            row = np.concatenate([ids[:first], ids[part.start : part.stop]])[:length]
            shift = part.start - first
            is_here = start in part and last in part
            none = 0 if part else NO_LABEL
            spans.append((start - shift, last - shift) if is_here else (none, none))
            rows.append(row)
            questions.append(question)
    if all(start == NO_LABEL for start, _ in spans):
        raise NeoError(f"length {length} leaves no question room for its context; raise it.")
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    labels = np.column_stack([np.array(spans, np.int32), labels[questions, 2]])
    return np.concatenate(rows), offsets, labels, np.array(questions)


def open_held_out(folder: str | os.PathLike[str], length: int) -> LabelledDataset | None:
    """Opens what is held out; None where nothing is."""
    has = HELD_OUT in read_json(make_path(folder) / DATASET_FILE).get("splits", {})
    return LabelledDataset.open(folder, HELD_OUT, length) if has else None


def labelled_batches(
    dataset: LabelledDataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields training batches without end; every epoch has each example once, in another order.

    The first batch is that of `start_step`; of each some rows are yielded, or all.
    """
    rows = range(batch_size) if rows is None else rows
    per_epoch, step = dataset.steps(batch_size), start_step
    while True:
        epoch, first = divmod(step, per_epoch)
        for examples in _order(dataset.lengths, batch_size, seed, epoch)[first:]:
            yield dataset.batch(examples, batch_size, rows)
        step = (epoch + 1) * per_epoch


def ordered_batches(
    dataset: LabelledDataset, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields every example once, the longest first: their numbers, and some rows of their batch."""
    rows = range(batch_size) if rows is None else rows
    order = np.argsort(-dataset.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        examples = order[start : start + batch_size]
        yield examples, dataset.batch(examples, batch_size, rows)


def _order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Returns the examples of each batch of an epoch: those of like length are together.

    Examples are shuffled, sorted by length within stretches of some batches, and the batches are
    shuffled; the one that is not full comes last.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    stretch = batch_size * _GROUPED
    batches: list[np.ndarray] = []
    for start in range(0, len(order), stretch):
        here = order[start : start + stretch]
        here = here[np.argsort(-lengths[here], kind="stable")]
        batches += [here[i : i + batch_size] for i in range(0, len(here), batch_size)]
    full = [batch for batch in batches if len(batch) == batch_size]
    rest = [batch for batch in batches if len(batch) < batch_size]
    return [full[i] for i in rng.permutation(len(full))] + rest
