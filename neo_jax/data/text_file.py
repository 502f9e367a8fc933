"""Files of text: one document, or those between separators; decoded here, and nowhere else.

Lines end with a line feed, whatever the file has: with the carriage returns that Windows writes
before it a text costs a model 0.8 bits a byte more.
"""

import codecs
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from neo_jax.errors import NeoError
from neo_jax.files.compression import UNPACKERS, open_unpacked

PART = 1 << 16
"""Characters of a text that are worth being handled together."""

MARK = "\ufeff"
"""By which some editors begin a file."""

_MOST = 1 << 20  # bytes of a section that is held in memory


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A file of text or a section of one, read anew each time, a part in memory at a time."""

    path: Path
    start: int = 0  # bytes of what is unpacked
    end: int | None = None  # None for a whole file

    def parts(self) -> Iterator[str]:
        """Yields the text in parts of at most `PART` characters.

        Raises:
          NeoError: the file is unreadable, damaged or not UTF-8.
        """
        blocks = _blocks(self.path, self.start, self.end)
        return _texts(blocks, self.path, self.start, self.end is not None)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.parts())


def text_parts(text: str | TextFile) -> Iterator[str]:
    """Returns the parts of a text, of at most `PART` characters, none of them empty."""
    if isinstance(text, TextFile):
        return text.parts()
    return (text[start : start + PART] for start in range(0, len(text), PART))


def sections(path: Path, separators: Sequence[str]) -> Iterator[str | TextFile]:
    """Yields the documents of a file: what stands between separators, or all of it without any.

    The ends of lines around a separator are no part of documents; a document may be empty. Long
    ones are files to read, others texts.

    Raises:
      NeoError: the file is unreadable, damaged or not UTF-8.
    """
    ends = [re.escape(each.encode()).replace(b"\\\n", rb"\r?\n") for each in separators]
    pattern, longest = re.compile(b"|".join(ends)), 2 * max(len(end) for end in ends)
    buffer, offset = b"", 0  # where the buffer begins in the file
    start, is_parted = 0, False

    def section(end: int) -> str | TextFile:
        if start < offset:
            return TextFile(path, start, end)
        data = buffer[start - offset : end - offset]
        return "".join(_texts([data], path, start, is_section=True))

    for block in _blocks(path):
        searched = max(0, start - offset, len(buffer) - longest)
        buffer += block
        for found in pattern.finditer(buffer, searched):
            yield section(offset + found.start())
            start, is_parted = offset + found.end(), True
        begin = start - offset
        is_short = begin >= 0 and len(buffer) - begin <= _MOST
        forget = begin if is_short else max(0, len(buffer) - longest)
        buffer, offset = buffer[forget:], offset + forget
    yield section(offset + len(buffer)) if is_parted else TextFile(path)


def _blocks(path: Path, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    with open_unpacked(path) as file:
        if file.seekable():
            place = file.seek(start)
        else:
            place = 0
            while place < start and (skipped := file.read(min(PART, start - place))):
                place += len(skipped)
        while data := file.read(PART if end is None else min(PART, end - place)):
            place += len(data)
            yield data


def _texts(blocks: Iterable[bytes], path: Path, start: int, is_section: bool) -> Iterator[str]:
    """Yields the text of bytes that begin at a place of a file, none of it empty."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, held, ahead, is_begun = start, "", MARK if not start else "", False
    for data in itertools.chain(blocks, [b""]):
        held_back = len(decoder.getstate()[0])
        try:
            text = held + decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise not_utf8(path, error, offset - held_back) from error
        offset += len(data)
        text, ahead = text.removeprefix(ahead), "" if text else ahead
        if is_section and not is_begun:
            text = text.lstrip("\r\n")
        is_begun = is_begun or bool(text)
        rest = text.rstrip("\r\n") if is_section else text.removesuffix("\r")
        held, text = (text[len(rest) :], rest) if data or is_section else ("", text)
        yield from text_parts(text.replace("\r\n", "\n"))


def not_utf8(path: Path, error: UnicodeDecodeError, offset: int) -> NeoError:
    """Returns what to raise for bytes that begin at an offset in a file."""
    packed = " once decompressed" if path.suffix in UNPACKERS else ""
    return NeoError(
        f"{path} is not UTF-8: byte {offset + error.start}{packed} is "
        f"0x{error.object[error.start]:02x}; convert it, for example with iconv."
    )
