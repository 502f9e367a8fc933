"""Examples with labels to a data set on disk, whose files `labelled` describes."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from neo_jax.data.atomic_folder import DATA, staging
from neo_jax.data.examples import Answers, Example, Schema, WordTags, read_examples
from neo_jax.data.labelled import ANSWERS_FILE, KIND, LABELS_FILE
from neo_jax.data.statistics import length_statistics
from neo_jax.data.tokenizing import is_held_out, token_dtype
from neo_jax.data.writer import DATASET_FILE, HELD_OUT, OFFSETS_FILE, TOKENS_FILE, TRAIN, VERSION
from neo_jax.errors import NeoError
from neo_jax.files.paths import absolute, make_path
from neo_jax.labels import HeadConfig, unnamed
from neo_jax.text.spans import NO_LABEL, TokenEnds
from neo_jax.text.tokenizer import Tokenizer, find_tokenizer


def prepare_labelled(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    tokenizer: Tokenizer | str | os.PathLike[str],
    schema: Schema = Schema(),  # noqa: B008
    *,
    held_out: float = 0.0,
    held_out_inputs: Sequence[str | os.PathLike[str]] = (),
    skip_bad: int = 0,
) -> dict[str, Any]:
    """Tokenizes examples into a data set folder, which appears complete or not at all.

    Args:
      inputs: .tsv, .csv and .jsonl files, folders, globs, and hf://NAME:CONFIG:SPLIT.
      output: the folder to write, new or empty.
      tokenizer: a tokenizer, the folder or file of one, or a model's name.
      schema: how rows of the inputs are examples; without labels those of the training examples
        are taken, sorted.
      held_out: the share of examples to hold out; as in `prepare` a property of their texts alone,
        where they are questions of their contexts, so that no context is in both splits.
      held_out_inputs: instead, files of examples to hold out.
      skip_bad: rows that cannot be examples and are left out, at most.

    Returns:
      The content of dataset.json: "splits" gives for each "examples", "tokens", "bytes", "lengths"
      and "balance", how many examples have each label.

    Raises:
      NeoError: see `read_examples`; a label that only held-out examples have, one label alone, or
        no answer; a split without examples; an output that is there already.
    """
    if not 0 <= held_out < 1 or (held_out and held_out_inputs):
        raise NeoError(
            f"held_out is a share of the examples from 0 to below 1, not {held_out}; or name the "
            "files of held-out examples."
        )
    if isinstance(tokenizer, str | os.PathLike):
        tokenizer = find_tokenizer(tokenizer)
    found = read_examples(inputs, schema, skip_bad)
    splits = {TRAIN: [example for example in found if not is_held_out(_key(example), held_out)]}
    if held_out:
        splits[HELD_OUT] = [e for e in found if is_held_out(_key(e), held_out)]
    if not all(splits.values()):
        raise NeoError(
            f"with held_out {held_out} a split has none of the {len(found)} examples; choose "
            "another share, or give more examples."
        )
    schema = dataclasses.replace(schema, labels=schema.labels or _names(splits[TRAIN], schema))
    if held_out_inputs:
        splits[HELD_OUT] = read_examples(held_out_inputs, schema, skip_bad)
    head = HeadConfig(schema.kind, schema.labels, schema.problem_type)
    return write_labelled(output, tokenizer, head, splits)


def write_labelled(
    output: str | os.PathLike[str],
    tokenizer: Tokenizer,
    head: HeadConfig,
    splits: Mapping[str, Sequence[Example]],
) -> dict[str, Any]:
    """Writes examples, "train" and perhaps "held_out", for a head; returns as `prepare_labelled`.

    Raises:
      NeoError: an output that is there already, or being written.
    """
    with staging(absolute(make_path(output))) as folder:
        dtype = token_dtype(tokenizer)
        statistics = {
            name: _write(folder / DATA / name, examples, tokenizer, head, dtype)
            for name, examples in splits.items()
        }
        fields = {
            "version": VERSION,
            "kind": KIND,
            "head": head.kind,
            "dtype": dtype.name,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "labels": [*head.labels],
            "problem_type": head.problem_type,
            "splits": statistics,
        }
        tokenizer.save(folder / DATA)
        text = json.dumps(fields, indent=2) + "\n"
        (folder / DATA / DATASET_FILE).write_text(text, encoding="utf-8")
        return fields


def _key(example: Example) -> str:
    """Returns the text by which an example is held out or not."""
    label = example.label
    return example.text[label.context :] if isinstance(label, Answers) else example.text


def _has_answer(example: Example) -> bool:
    return isinstance(example.label, Answers) and any(example.label.texts)


def _labels_of(example: Example) -> tuple[str, ...]:
    """Returns the names of labels that an example has."""
    label = example.label
    if isinstance(label, WordTags):
        return tuple(filter(None, label.labels))
    return tuple(map(str, label)) if isinstance(label, tuple) else (str(label),)


def _names(examples: Sequence[Example], schema: Schema) -> tuple[str, ...]:
    """Returns the labels that there are, sorted, numbers as numbers."""
    if schema.problem_type == "regression":
        return unnamed(1)
    if schema.kind == "qa_outputs":
        if not any(_has_answer(example) for example in examples):
            raise NeoError(f"no question has an answer in '{schema.label}'; name another column.")
        return unnamed(2)  # as transformers has them, of start and end
    found: set[str] = set()
    for example in examples:
        found.update(_labels_of(example))
    if len(found) < 2 and schema.problem_type == "single_label_classification":
        raise NeoError(
            f"all examples have the label {', '.join(found) or 'none'}; a classifier needs two, or "
            "name them with --labels."
        )
    is_number = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name), name) if is_number else (0, name)))


def _write(
    folder: Path,
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    head: HeadConfig,
    dtype: np.dtype[Any],
) -> dict[str, Any]:
    """Writes a split; returns its statistics."""
    folder.mkdir(parents=True)
    ids = tokenizer.encode_batch([example.text for example in examples])
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    tokens = np.concatenate([np.asarray(each, dtype) for each in ids])
    (folder / TOKENS_FILE).write_bytes(tokens.tobytes())
    np.save(folder / OFFSETS_FILE, offsets)
    if head.kind == "score":
        labels = encode_labels([example.label for example in examples], head)
    else:
        labels = _labels_of_tokens(examples, ids, head, TokenEnds(tokenizer))
    np.save(folder / LABELS_FILE, labels)
    if head.kind == "qa_outputs":
        answers = [e.label.texts for e in examples if isinstance(e.label, Answers)]
        (folder / ANSWERS_FILE).write_text(json.dumps(answers) + "\n", encoding="utf-8")
    statistics: dict[str, Any] = {
        "examples": len(examples),
        "bytes": sum(len(example.text.encode()) for example in examples),
        "tokens": len(tokens),
        "lengths": length_statistics(folder / OFFSETS_FILE),
    }
    if head.problem_type == "regression":
        values = np.array([example.label for example in examples], float)
        return statistics | {"mean": values.mean(), "sd": values.std()}
    if head.kind == "qa_outputs":
        return statistics | {"unanswerable": len(examples) - sum(map(_has_answer, examples))}
    if head.kind == "classifier":
        statistics["words"] = int(np.count_nonzero(labels != NO_LABEL))
    counts = Counter(label for example in examples for label in _labels_of(example))
    return statistics | {"balance": {label: counts[label] for label in head.labels}}


def _labels_of_tokens(
    examples: Sequence[Example], ids: Sequence[Sequence[int]], head: HeadConfig, ends_of: TokenEnds
) -> np.ndarray:
    """Returns the labels of examples whose head reads every token, see `labelled`."""
    number, rows = {label: i for i, label in enumerate(head.labels)}, []
    for example, tokens in zip(examples, ids, strict=True):
        label, ends = example.label, ends_of(example.text, tokens)
        row: np.ndarray
        if isinstance(label, WordTags):
            row = np.full(len(tokens), NO_LABEL, np.int32)
            firsts = np.searchsorted(ends, label.starts, side="right")
            for token, name in zip(firsts, label.labels, strict=True):
                if name:
                    row[token] = number[name]
        else:
            assert isinstance(label, Answers)
            last = label.start + len(label.texts[0]) - 1
            row = np.searchsorted(ends, [label.start, last, label.context], side="right")
            if not label.texts[0]:
                row[:2] = 0  # the first token stands for no answer
        rows.append(row)
    return (np.concatenate if head.kind == "classifier" else np.stack)(rows).astype(np.int32)


def encode_labels(labels: Sequence[Any], head: HeadConfig) -> np.ndarray:
    """Returns labels as a batch has them, see `labelled`."""
    if head.problem_type == "regression":
        return np.array(labels, np.float32)
    number = {label: i for i, label in enumerate(head.labels)}
    if head.problem_type == "single_label_classification":
        return np.array([number[label] for label in labels], np.int32)
    ones = np.zeros((len(labels), len(number)), np.float32)
    for row, several in enumerate(labels):
        ones[row, [number[label] for label in several]] = 1
    return ones
