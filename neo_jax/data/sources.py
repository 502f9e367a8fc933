"""Where documents come from: files of text, JSON lines or TFRecords, and Hugging Face data sets."""

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.data.hugging_face import SCHEME, HubDataset
from neo_jax.data.listing import data_files
from neo_jax.data.text_file import MARK, TextFile, not_utf8, sections
from neo_jax.data.tfrecords import Record, read_records
from neo_jax.errors import NeoError, reason
from neo_jax.files.compression import UNPACKERS, open_unpacked, unpacked_name
from neo_jax.files.paths import file_version
from neo_jax.text.tokenizer import END_OF_TEXT

ENDINGS = (".txt", ".jsonl", ".tfrecord", ".tfrecords")
"""A .txt file is one document, or several with ends of text between them; every line of a .jsonl
file is one, {"text": ..., "meta": ...}, or a pair, {"prompt": ..., "completion": ...}; of TFRecords
every record. All may be compressed, as .jsonl.zst."""


class Pair(NamedTuple):
    """A prompt, and how it is to go on."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, one after the other."""
        return self.prompt + self.completion


class Run(NamedTuple):
    """A part of a document, of which parts are held out."""

    text: str
    is_held_out: bool


Document = str | TextFile | Record | Pair | Run


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or a data set of the Hugging Face hub."""

    name: str
    version: str  # changes when the content does
    documents: Callable[[], Iterator[Document]]  # in order, one in memory at a time


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], text_field: str = "text", separator: str = ""
) -> list[Source]:
    """Returns what inputs name, in their order.

    Args:
      inputs: files, folders and globs, as `files.data_files` takes them; and
        hf://NAME:CONFIG:SPLIT.
      text_field: the name of the text in a JSON line or a row, and of the ids in a TFRecord.
      separator: what else than `<|endoftext|>` stands between the documents of a .txt file; that
        this does is reported on stderr where it is found.

    Raises:
      NeoError: nothing matches, or an unknown ending. The iterators of documents raise it for a
        file that is unreadable, damaged or not UTF-8, and for a line without a text, or with a
        prompt and nothing to follow it.
    """
    if len(separator) > _LONGEST_SEPARATOR:
        raise NeoError(f"a separator has at most {_LONGEST_SEPARATOR} characters.")
    separators = tuple(filter(None, (separator, END_OF_TEXT)))
    reading = _Reading(text_field, separators, functools.cache(_report) if not separator else None)
    sources: list[Source] = []
    for name in [os.fspath(path) for path in inputs]:
        try:
            sources += _named(name, reading)
        except OSError as error:
            raise NeoError(f"cannot read {error.filename or name}: {reason(error)}.") from error
    if not sources:
        raise NeoError("no input is named; name text or jsonl files, folders or globs.")
    return sources


_LONGEST_SEPARATOR = 1000


class _Reading(NamedTuple):
    """How files are read."""

    text_field: str
    separators: tuple[str, ...]
    report: Callable[[], None] | None  # of separators that are found


def _report() -> None:
    print(f"documents of .txt files are what stands between {END_OF_TEXT}", file=sys.stderr)


def _named(name: str, reading: _Reading) -> list[Source]:
    if name.startswith(SCHEME):
        dataset = HubDataset(name, reading.text_field)
        return [Source(name, dataset.version, dataset.texts)]
    return [
        Source(str(path), file_version(path), functools.partial(_read, path, reading))
        for path in data_files(name, _is_known, _KNOWN)
    ]


def _is_known(name: str) -> bool:
    return unpacked_name(name).endswith(ENDINGS)


_KNOWN = f"{', '.join(ENDINGS)}, also with {', '.join(UNPACKERS)}"


def _read_text(path: Path, reading: _Reading) -> Iterator[str | TextFile]:
    for number, section in enumerate(sections(path, reading.separators)):
        if number and reading.report:
            reading.report()
        yield section


def _read_json(path: Path, reading: _Reading) -> Iterator[str | Pair]:
    text_field = reading.text_field
    for where, fields in json_lines(path):
        if text_field in fields or "prompt" not in fields:
            yield _string(where, fields, text_field, f'{{"{text_field}": "..."}}')
            continue
        example = '{"prompt": "...", "completion": "..."}'
        pair = Pair(*(_string(where, fields, name, example) for name in Pair._fields))
        if not pair.completion:
            raise NeoError(f'{where}: the "completion" is empty; write one, or remove the line.')
        yield pair


def _string(where: str, fields: dict[str, Any], name: str, example: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str):
        raise NeoError(f'{where}: no "{name}"; every line is an object such as {example}.')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise NeoError(f'{where}: "{name}" holds the lone surrogate {lone!r}.') from error
    return text


def _read_tfrecords(path: Path, reading: _Reading) -> Iterator[Record]:
    with open_unpacked(path) as file:
        yield from read_records(file, str(path), reading.text_field)


def _read(path: Path, reading: _Reading) -> Iterator[Document]:
    return _READERS[os.path.splitext(unpacked_name(path.name))[1]](path, reading)


_READERS: dict[str, Callable[[Path, _Reading], Iterator[Document]]] = {
    ".txt": _read_text,
    ".jsonl": _read_json,
    ".tfrecord": _read_tfrecords,
    ".tfrecords": _read_tfrecords,
}


def json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the object on every line that is not blank, and "path:number" to name it in errors.

    Raises:
      NeoError: a file that is unreadable, damaged or not UTF-8, or a line that is no JSON object.
    """
    for number, line in text_lines(path):
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise NeoError(f"{path}:{number}: not valid JSON ({error}).") from error
        except RecursionError as error:
            raise NeoError(f"{path}:{number}: lists or objects nested too deeply.") from error
        if not isinstance(fields, dict):
            raise NeoError(f"{path}:{number}: a {type(fields).__name__}, not a JSON object.")
        yield f"{path}:{number}", fields


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields every line that is not blank, without its end, and its number from 1.

    Raises:
      NeoError: a file that is unreadable, damaged or not UTF-8.
    """
    with open_unpacked(path) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            decoded = _decode(path, line, offset)
            offset += len(line)
            if decoded.strip():
                yield number, decoded.rstrip("\r\n")


def _decode(path: Path, line: bytes, offset: int) -> str:
    """Decodes UTF-8, without the byte order mark that some editors begin a file with."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, error, offset) from error
    return text if offset else text.removeprefix(MARK)
