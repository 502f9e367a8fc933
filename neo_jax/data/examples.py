"""Examples with labels: rows of .tsv, .csv and .jsonl files and of Hugging Face data sets.

A row that cannot be one is an error of one line that names the file and the row; so many of them as
a caller allows are left out instead, and counted.
"""

import csv
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.data.hugging_face import SCHEME, HubDataset
from neo_jax.data.listing import data_files
from neo_jax.data.sources import json_lines, text_lines
from neo_jax.errors import NeoError, brief, reason, suggest
from neo_jax.files.compression import UNPACKERS, unpacked_name
from neo_jax.labels import HeadKind, ProblemType
from neo_jax.text.classify import as_one_text
from neo_jax.text.spans import NO_LABEL, join_question, join_words

TABLES = (".tsv", ".csv")
ENDINGS = (*TABLES, ".jsonl")

_NAMED = 3  # of the rows that are left out


class WordTags(NamedTuple):
    """The labels of the words of a text."""

    starts: Sequence[int]  # the character at which each word begins
    labels: tuple[str, ...]  # "" of a word that has none


class Answers(NamedTuple):
    """Where a text, a question and its context on a line each, has the answer."""

    start: int  # the character at which it begins; 0 where there is none
    context: int  # and that at which the context does
    texts: tuple[str, ...]  # the answer, and others that are as right; "" where there is none


class Example(NamedTuple):
    """A text, or two that belong together, and what is known of it."""

    text: str
    # A name; a number of a regression; any of several names; what a head that reads tokens learns.
    label: str | float | tuple[str, ...] | WordTags | Answers


@dataclasses.dataclass(frozen=True)
class Schema:
    """How a row is an example: where its parts are, and what is learned of it.

    Columns have names, or numbers from 1 in files whose first line names none. A head `classifier`
    takes a list of words and one of their labels, of which null and -100 are none; `qa_outputs` a
    context, a question as the second text, and answers as SQuAD has them: {"text": [...],
    "answer_start": [...]}, a list of {"text", "answer_start"}, or a text with a column
    answer_start; where these are empty the question has none.
    """

    text: str = "text"
    label: str = "label"
    second_text: str = ""  # "" for examples of one text
    kind: HeadKind = "score"  # the head that learns them: labels of texts, of words, or answers
    # What labels of texts are: one name, any of several names, or a number.
    problem_type: ProblemType = "single_label_classification"
    labels: tuple[str, ...] = ()  # the names that may be, in a model's order; () is any, sorted

    @classmethod
    def usual(cls, kind: HeadKind) -> "Schema":
        """Returns the one with the names of columns that are usual for what a head learns."""
        return cls(kind=kind, **_USUAL.get(kind, {}))


_USUAL: dict[HeadKind, dict[str, Any]] = {
    "classifier": {"text": "tokens", "label": "tags"},
    "qa_outputs": {"text": "context", "label": "answers", "second_text": "question"},
}


def read_examples(
    inputs: Sequence[str | os.PathLike[str]], schema: Schema = Schema(), skip_bad: int = 0
) -> list[Example]:
    """Returns the examples of all inputs, in order.

    Args:
      inputs: files, folders and globs, and hf://NAME:CONFIG:SPLIT.
      schema: how a row is one.
      skip_bad: so many rows that cannot be examples are left out, and reported on stderr.

    Raises:
      NeoError: nothing matches, or more rows than that have another number of columns, lack a
        column, an empty text or a label that cannot be.
    """
    examples, bad = [], []
    make = {"classifier": _words, "qa_outputs": _question}.get(schema.kind, _example)
    for where, row in _rows(inputs, schema):
        try:
            if isinstance(row, NeoError):
                raise row
            examples.append(make(where, row, schema))
        except NeoError as error:
            bad.append(str(error))
            if len(bad) > skip_bad:
                more = f" (row {len(bad)} of this kind)" if skip_bad else ""
                fix = f"--skip-bad {max(10, 2 * len(bad))} leaves such rows out"
                raise NeoError(f"{error}{more} {fix}.") from error
    if bad:
        first = "; ".join(bad[:_NAMED])
        print(f"{len(bad)} rows are left out: {first}", file=sys.stderr)
    if not examples:
        raise NeoError("the input holds no examples; are the files empty?")
    return examples


def _example(where: str, row: dict[str, Any], schema: Schema) -> Example:
    used, known = filter(None, (schema.text, schema.second_text)), schema.labels
    texts = [_text(where, row, name) for name in used]
    value = _cell(where, row, schema.label)
    text = as_one_text(texts) if len(texts) > 1 else texts[0]
    if schema.problem_type == "regression":
        return Example(text, _number(where, schema.label, value))
    if schema.problem_type == "multi_label_classification":
        several = value if isinstance(value, list) else str(value).split(",")
        names = tuple(_name(where, schema.label, each, known) for each in several if each != "")
        return Example(text, names)
    return Example(text, _name(where, schema.label, value, known))


def _words(where: str, row: dict[str, Any], schema: Schema) -> Example:
    words, tags = _cell(where, row, schema.text), _cell(where, row, schema.label)
    for name, cell in ((schema.text, words), (schema.label, tags)):
        if not isinstance(cell, list) or not cell:
            raise NeoError(f"{where}: '{name}' is {brief(cell)}, not a list with an entry a word.")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise NeoError(f"{where}: '{schema.text}' has {brief(word)}, which is no word.")
    if len(words) != len(tags):
        raise NeoError(
            f"{where}: {len(words)} '{schema.text}' have {len(tags)} '{schema.label}'; give one "
            "for each."
        )
    text, starts = join_words(words)
    names = (
        "" if tag in (None, NO_LABEL) else _name(where, schema.label, tag, schema.labels)
        for tag in tags
    )
    return Example(text, WordTags(starts, tuple(names)))


def _question(where: str, row: dict[str, Any], schema: Schema) -> Example:
    context, question = (_text(where, row, name) for name in (schema.text, schema.second_text))
    answers, name = _answers(row, _cell(where, row, schema.label)), schema.label
    for text, start in answers:
        if not isinstance(text, str) or not text.strip():
            raise NeoError(f"{where}: '{name}' has {brief(text)}, which is no answer.")
        if not isinstance(start, int) or context[max(start, 0) :][: len(text)] != text:
            raise NeoError(
                f"{where}: the answer {brief(text)} does not begin at character {brief(start)} of "
                f"'{schema.text}'; its answer_start must say where."
            )
    text, begin = join_question(question, context)
    if not answers:
        return Example(text, Answers(0, begin, ("",)))
    first, start = answers[0]
    lead = len(first) - len(first.lstrip())  # spaces around it are not the answer
    texts = tuple(text.strip() for text, _ in answers)
    return Example(text, Answers(begin + start + lead, begin, texts))


def _answers(row: dict[str, Any], cell: Any) -> list[tuple[Any, Any]]:
    """Returns answers and where they begin, of the forms in which files have them."""
    if isinstance(cell, str):
        start: Any = row.get("answer_start")
        is_written = isinstance(start, str) and start.isdecimal()  # in a table
        return [(cell, int(start) if is_written else start)] if cell else []
    if isinstance(cell, dict):
        texts, starts = (
            each if isinstance(each, list) else [each]
            for each in (cell.get("text"), cell.get("answer_start", []))
        )
        return [*itertools.zip_longest(texts, starts)]
    if not isinstance(cell, list):
        return [(cell, None)] if cell is not None else []
    return [
        (e.get("text"), e.get("answer_start")) if isinstance(e, dict) else (e, None) for e in cell
    ]


def _text(where: str, row: dict[str, Any], name: str) -> str:
    text = _cell(where, row, name)
    if not isinstance(text, str):
        raise NeoError(f"{where}: '{name}' is {brief(text)}, not a text.")
    if not text.strip():
        raise NeoError(f"{where}: '{name}' is empty; write a text, or remove the row.")
    return text


def _cell(where: str, row: dict[str, Any], name: str) -> Any:
    if name not in row:
        raise NeoError(f"{where}: there is no column '{name}'.{suggest(name, map(str, row))}")
    return row[name]


def _name(where: str, column: str, value: Any, known: Sequence[str]) -> str:
    """Returns the name of a label; numbers and true and false of JSON are names too."""
    is_name = isinstance(value, str | int) and value != ""
    if isinstance(value, bool):
        value = str(value).lower()
    name = str(value).strip()
    if not is_name or not name:
        raise NeoError(f"{where}: '{column}' is {brief(value)}, which is no label.")
    if known and name not in known:
        raise NeoError(f"{where}: unknown label {brief(name)}.{suggest(name, known)}")
    return name


def _number(where: str, column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise NeoError(f"{where}: '{column}' is {brief(value)}, not a number.")
    return number


def _rows(
    inputs: Sequence[str | os.PathLike[str]], schema: Schema
) -> Iterator[tuple[str, dict[str, Any] | NeoError]]:
    """Yields where each row is, and its cells by column, or why it has none."""
    for name in [os.fspath(path) for path in inputs]:
        if name.startswith(SCHEME):
            for number, row in enumerate(HubDataset(name, schema.text).rows(), 1):
                yield f"{name}, row {number}", row
            continue
        try:
            for path in data_files(name, _is_known, _KNOWN):
                yield from _READERS[os.path.splitext(unpacked_name(path.name))[1]](path, schema)
        except OSError as error:
            raise NeoError(f"cannot read {error.filename or name}: {reason(error)}.") from error


def _is_known(name: str) -> bool:
    return unpacked_name(name).endswith(ENDINGS)


def is_table(name: str) -> bool:
    """Returns whether a file is one of rows and columns, by its name."""
    return unpacked_name(name).endswith(TABLES)


_KNOWN = f"{', '.join(ENDINGS)}, also with {', '.join(UNPACKERS)}"


def _json_rows(path: Path, _: Schema) -> Iterator[tuple[str, dict[str, Any]]]:
    return json_lines(path)


def table_rows(
    path: Path, delimiter: str, has_names: bool = True
) -> Iterator[tuple[str, dict[str, Any] | NeoError]]:
    """Yields where each row of a table is, and its cells by column, or why it has none.

    Args:
      path: a file of UTF-8.
      delimiter: "," for CSV, quoted as usual; a tab for cells that are not quoted.
      has_names: whether the first line names the columns, which else are called "1", "2", ...

    Raises:
      NeoError: the file cannot be read.
    """
    quoting: Any = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    csv.field_size_limit(sys.maxsize)
    lines = text_lines(path)
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number
        for number, line in lines:  # noqa: B007  (the row that is read ends there)
            yield f"{line}\n"

    names: list[str] | None = None if has_names else []
    try:
        for cells in csv.reader(texts(), delimiter=delimiter, quoting=quoting, strict=True):
            where = f"{path}:{number}"
            if names is None:
                names = cells
                continue
            keys = names or [str(i) for i in range(1, len(cells) + 1)]
            if len(keys) != len(cells):
                yield (
                    where,
                    NeoError(f"{where}: {len(cells)} columns, but the first line has {len(keys)}."),
                )
                continue
            yield where, dict(zip(keys, cells, strict=True))
    except csv.Error as error:
        raise NeoError(f"{path}:{number}: {error}; is it quoted as CSV is?") from error


def _has_names(schema: Schema) -> bool:
    return not (schema.text.isdecimal() and schema.label.isdecimal())


_READERS = {
    ".tsv": lambda path, schema: table_rows(path, "\t", _has_names(schema)),
    ".csv": lambda path, schema: table_rows(path, ",", _has_names(schema)),
    ".jsonl": _json_rows,
}
