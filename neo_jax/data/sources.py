"""Documents from files: plain text, and The Pile's JSON lines, each perhaps compressed."""

import contextlib
import glob
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from neo_jax.errors import NeoError, reason
from neo_jax.paths import find_files, make_path, match, open_binary

ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.xz", ".jsonl.xz")
"""A .txt file is one document; every line of a .jsonl file is one, {"text": ..., "meta": ...}."""


def documents(paths: Sequence[str | os.PathLike[str]]) -> Iterator[str]:
    """Yields the text of every document, in the order of `paths`, one in memory at a time.

    Args:
      paths: files; folders, whose files of a known ending are read in sorted order, those of
        sub-folders too and hidden ones not; and globs, in which ** stands for any sub-folders.

    Raises:
      NeoError: nothing matches, an unknown ending, a file that is unreadable, damaged or not
        UTF-8, or a line that is not a JSON object with a "text". Paths that match nothing are
        reported before the first document.
    """
    files = [file for path in paths for file in _files(os.fspath(path))]
    if not files:
        raise NeoError("no input is named; name text or jsonl files, folders or globs.")
    for file in files:
        yield from _read(file)


def _files(path: str) -> list[Path]:
    named = make_path(path)
    if named.exists():
        matches = [named]
    elif glob.has_magic(path):
        matches = match(path)
        if not matches:
            raise NeoError(f"nothing matches '{path}'; is the folder right?")
    else:
        raise NeoError(f"{path} does not exist.")
    files = []
    for found in matches:
        if found.is_dir():
            inside = [file for file in find_files(found) if _is_document_file(file, found)]
            if not inside and len(matches) == 1:
                raise NeoError(f"{found} holds no file that ends in {', '.join(ENDINGS)}.")
            files += inside
        elif not found.name.endswith(ENDINGS):
            raise NeoError(f"{found}: unknown ending; known are {', '.join(ENDINGS)}.")
        else:
            files.append(found)
    if not files:
        raise NeoError(f"no file that '{path}' matches ends in {', '.join(ENDINGS)}.")
    return files


def _is_document_file(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return file.name.endswith(ENDINGS) and not hidden


def _read(path: Path) -> Iterator[str]:
    if not path.name.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl"):
        with _open(path) as file:
            yield _decode(path, file.read(), 0)
        return
    for where, fields in json_lines(path):
        text = fields.get("text")
        if not isinstance(text, str):
            raise NeoError(
                f'{where}: no "text"; every line is an object such as {{"text": "..."}}.'
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            lone = text[error.start]
            raise NeoError(f'{where}: "text" holds the lone surrogate {lone!r}.') from error
        yield text


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
        if not isinstance(fields, dict):
            raise NeoError(f"{path}:{number}: a {type(fields).__name__}, not a JSON object.")
        yield f"{path}:{number}", fields


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields every line that is not blank, without its end, and its number from 1.

    Raises:
      NeoError: a file that is unreadable, damaged or not UTF-8.
    """
    with _open(path) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            decoded = _decode(path, line, offset)
            offset += len(line)
            if decoded.strip():
                yield number, decoded.rstrip("\r\n")


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    unpackers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        with open_binary(path) as file:
            yield unpackers[path.suffix](file) if path.suffix in unpackers else file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise NeoError(f"{path} is damaged ({error}); copy it again.") from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error


def _decode(path: Path, data: bytes, offset: int) -> str:
    """Decodes UTF-8, without the byte order mark that some editors begin a file with."""
    try:
        return data.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        packed = " once decompressed" if path.suffix in (".gz", ".xz") else ""
        # utf-8-sig counts from behind the mark.
        mark = 3 if offset == 0 and data.startswith(b"\xef\xbb\xbf") else 0
        raise NeoError(
            f"{path} is not UTF-8: byte {offset + mark + error.start}{packed} is "
            f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
        ) from error
