"""Files that may be compressed: .gz, .xz and .zst are read as what they hold."""

import contextlib
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from neo_jax.errors import NeoError, reason
from neo_jax.paths import open_binary


@contextlib.contextmanager
def open_unpacked(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to read what it holds, by its ending decompressed.

    Raises:
      NeoError: the file cannot be read, or is damaged; from reading inside the context too.
    """
    unpack = UNPACKERS.get(path.suffix)
    try:
        with open_binary(path) as file:
            yield unpack(file) if unpack else file
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise NeoError(f"{path} is damaged ({error}); copy it again.") from error
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error


def unpacked_name(name: str) -> str:
    """Returns the name of a file without the ending of its compression."""
    stem, ending = os.path.splitext(name)
    return stem if ending in UNPACKERS else name


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file, one behind the other.

    zstandard's own reader takes a file that was cut short for one that ends there.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._error = zstandard.ZstdError
        # The Pile is packed with windows larger than the library takes unasked.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame: Any = None  # None between frames
        self._packed = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(_BLOCK_BYTES)
            if not self._packed:
                if self._frame:
                    raise EOFError("it ends within a frame")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size

    def _unpack(self) -> None:
        self._frame = self._frame or self._decompressor.decompressobj()
        try:
            self._unpacked = memoryview(self._frame.decompress(self._packed))
        except self._error as error:
            raise EOFError(str(error)) from error
        self._packed = self._frame.unused_data
        if self._frame.eof:
            self._frame = None


_BLOCK_BYTES = 1 << 16

UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(_Zstandard(file), _BLOCK_BYTES),
}
"""What opens a file of each ending."""
