"""Where documents come from: files of text, JSON lines or TFRecords, and Hugging Face data sets."""

import codecs
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.data.hugging_face import SCHEME, HubDataset
from neo_jax.data.listing import data_files
from neo_jax.data.tfrecords import Record, read_records
from neo_jax.errors import NeoError, reason
from neo_jax.files.compression import UNPACKERS, open_unpacked, unpacked_name
from neo_jax.files.paths import file_version

ENDINGS = (".txt", ".jsonl", ".tfrecord", ".tfrecords")
"""A .txt file is one document; every line of a .jsonl file is one, {"text": ..., "meta": ...}, or a
pair, {"prompt": ..., "completion": ...}; of TFRecords every record. All may be compressed, as
.jsonl.zst."""


class Pair(NamedTuple):
    """A prompt, and how it is to go on."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, one after the other."""
        return self.prompt + self.completion


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text, which is read anew each time, a part in memory at a time."""

    path: Path

    def parts(self) -> Iterator[str]:
        """Yields the text in parts of at most `PART` characters.

        Raises:
          NeoError: the file is unreadable, damaged or not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        offset, mark, data = 0, _MARK, b"-"
        with open_unpacked(self.path) as file:
            while data:
                data = file.read(PART)
                held_back = len(decoder.getstate()[0])
                try:
                    text = decoder.decode(data, final=not data)
                except UnicodeDecodeError as error:
                    raise _not_utf8(self.path, error, offset - held_back) from error
                offset += len(data)
                if text:
                    text, mark = text.removeprefix(mark), ""
                if text:
                    yield text

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts())


class Run(NamedTuple):
    """A part of a document, of which parts are held out."""

    text: str
    is_held_out: bool


Document = str | TextFile | Record | Pair | Run

PART = 1 << 16
"""Characters of a text that are worth being handled together."""

_MARK = "\ufeff"  # by which some editors begin a file


def text_parts(text: str | TextFile) -> Iterator[str]:
    """Returns the parts of a text, of at most `PART` characters, none of them empty."""
    if isinstance(text, TextFile):
        return text.parts()
    return (text[start : start + PART] for start in range(0, len(text), PART))


@dataclasses.dataclass(frozen=True)
class Source:
    """A file, or a data set of the Hugging Face hub."""

    name: str
    version: str  # changes when the content does
    documents: Callable[[], Iterator[Document]]  # in order, one in memory at a time


def find_sources(
    inputs: Sequence[str | os.PathLike[str]], text_field: str = "text"
) -> list[Source]:
    """Returns what inputs name, in their order.

    Args:
      inputs: files, folders and globs, as `files.data_files` takes them; and
        hf://NAME:CONFIG:SPLIT.
      text_field: the name of the text in a JSON line or a row, and of the ids in a TFRecord.

    Raises:
      NeoError: nothing matches, or an unknown ending. The iterators of documents raise it for a
        file that is unreadable, damaged or not UTF-8, and for a line without a text, or with a
        prompt and nothing to follow it.
    """
    sources: list[Source] = []
    for name in [os.fspath(path) for path in inputs]:
        try:
            sources += _named(name, text_field)
        except OSError as error:
            raise NeoError(f"cannot read {error.filename or name}: {reason(error)}.") from error
    if not sources:
        raise NeoError("no input is named; name text or jsonl files, folders or globs.")
    return sources


def _named(name: str, text_field: str) -> list[Source]:
    if name.startswith(SCHEME):
        dataset = HubDataset(name, text_field)
        return [Source(name, dataset.version, dataset.texts)]
    return [
        Source(str(path), file_version(path), functools.partial(_read, path, text_field))
        for path in data_files(name, _is_known, _KNOWN)
    ]


def _is_known(name: str) -> bool:
    return unpacked_name(name).endswith(ENDINGS)


_KNOWN = f"{', '.join(ENDINGS)}, also with {', '.join(UNPACKERS)}"


def _read_text(path: Path, _: str) -> Iterator[TextFile]:
    yield TextFile(path)


def _read_json(path: Path, text_field: str) -> Iterator[str | Pair]:
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


def _read_tfrecords(path: Path, text_field: str) -> Iterator[Record]:
    with open_unpacked(path) as file:
        yield from read_records(file, str(path), text_field)


def _read(path: Path, text_field: str) -> Iterator[Document]:
    return _READERS[os.path.splitext(unpacked_name(path.name))[1]](path, text_field)


_READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
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
        raise _not_utf8(path, error, offset) from error
    return text if offset else text.removeprefix(_MARK)


def _not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> NeoError:
    """Returns what to raise for bytes that begin at an offset in a file."""
    packed = " once decompressed" if path.suffix in UNPACKERS else ""
    return NeoError(
        f"{path} is not UTF-8: byte {offset + error.start}{packed} is "
        f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
    )
