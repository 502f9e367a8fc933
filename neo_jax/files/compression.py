"""Files that may be compressed: .bz2, .gz, .xz and .zst are read as what they hold, all of it."""

import bz2
import contextlib
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import open_binary


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to read what it holds, by its ending decompressed, a piece at a time.

    Raises:
      NeoError: the file cannot be read, or is damaged; from reading inside the context too.
    """
    unpack = UNPACKERS.get(path.suffix)
    try:
        with open_binary(path) as file:
            yield unpack(file) if unpack else file
    except _DamageError as error:
        raise NeoError(f"{path} is damaged ({error}); copy it again.") from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error


def unpacked_name(name: str) -> str:
    """Returns the name of a file without the ending of its compression."""
    stem, ending = os.path.splitext(name)
    return stem if ending in UNPACKERS else name


class _DamageError(Exception):
    """What is wrong with a compressed file."""


class _Streams(io.RawIOBase):
    """What the compressed streams of a file hold, one after the other.

    Zeros behind a stream are padding, as for gzip; all else must be another stream. The readers of
    lzma and bz2 end in silence at what is none, and zstandard's at a frame that is cut short.

    Args:
      file: has one stream or more.
      start: begins a stream: returns what has the methods of `lzma.LZMADecompressor`.
      block: bytes to read at once.
    """

    def __init__(self, file: IO[bytes], start: Callable[[], Any], block: int) -> None:
        self._file, self._start, self._block = file, start, block
        self._stream = start()  # None between two
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            if not self._packed and (self._stream is None or self._stream.needs_input):
                self._packed = self._file.read(self._block)
                if not self._packed:
                    if self._stream is not None:
                        raise _DamageError("it ends within a stream")
                    return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        if self._stream is None:
            self._packed = self._packed.lstrip(b"\0")
            if not self._packed:
                return
            self._stream = self._start()
        try:
            self._unpacked = memoryview(self._stream.decompress(self._packed, _PIECE))
        except (OSError, lzma.LZMAError, zlib.error) as error:  # bz2 raises OSError
            raise _DamageError(str(error)) from error
        self._packed = self._stream.unused_data
        if self._stream.eof:
            self._stream = None


class _GzipMember:
    """A member of a .gz file, with the methods of `lzma.LZMADecompressor`."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)

    def decompress(self, packed: bytes, most: int) -> bytes:
        return self._member.decompress(packed or self._member.unconsumed_tail, most)

    @property
    def needs_input(self) -> bool:
        return not self._member.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


class _ZstandardFrame:
    """A frame of a .zst file, with the methods of `lzma.LZMADecompressor`.

    All that a call is given is unpacked at once: a block of four bytes may hold 128 KiB.
    """

    needs_input = True

    def __init__(self) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        # The Pile is packed with windows larger than the library takes by default.
        self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def decompress(self, packed: bytes, _: int) -> bytes:
        try:
            return self._frame.decompress(packed)
        except self._error as error:
            raise _DamageError(str(error)) from error

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


_PIECE = 1 << 16  # bytes that are unpacked at once


def _streams(start: Callable[[], Any], block: int = _PIECE) -> Callable[[IO[bytes]], Any]:
    return lambda file: io.BufferedReader(_Streams(file, start, block), _PIECE)


UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".bz2": _streams(bz2.BZ2Decompressor),
    ".gz": _streams(_GzipMember),
    ".xz": _streams(lzma.LZMADecompressor),
    ".zst": _streams(_ZstandardFrame, 512),
}
"""What opens a file of each ending."""
