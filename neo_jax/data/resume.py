"""How far a data set is made, on disk: what was stopped goes on from there.

Every line of a journal says how far the inputs are read and how long the files of the splits are by
then. It holds as long as all that it comes from is the same: the settings, and the inputs up to
the one that is being read. What follows may change: a damaged file can be replaced.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from neo_jax.data.sources import Source
from neo_jax.data.writer import Extent

_SECONDS = 10.0  # between two lines


class Place(NamedTuple):
    """A place in the inputs, and in the files that were written up to there."""

    source: int  # the input that is being read
    documents: int  # of it that are read
    extents: dict[str, Extent]  # of every split


class Journal:
    """The lines of a journal; a new process reads it once and goes on writing.

    Args:
      path: of the file, which need not be there yet.
      settings: anything in JSON that decides what the data set holds, beside the inputs.
      sources: the inputs.
    """

    def __init__(self, path: Path, settings: Any, sources: Sequence[Source]) -> None:
        self._path = path
        self._digests = digests(settings, sources)
        self._time = time.monotonic()

    def newest(self, holds: Callable[[Place], bool]) -> Place | None:
        """Returns the newest place that is still true, and forgets those that are not.

        Args:
          holds: whether the files are as long as a place says.
        """
        found, lines = None, []
        for line in self._path.read_text("utf-8").splitlines() if self._path.exists() else ():
            place = self._place(line)
            if place is None or not holds(place):
                break
            found = place
            lines.append(line + "\n")
        self._path.write_text("".join(lines), encoding="utf-8")
        return found

    @property
    def is_empty(self) -> bool:
        """Whether nothing is written: there is nothing to go on from."""
        return not self._path.exists() or not self._path.stat().st_size

    @property
    def is_due(self) -> bool:
        """Whether the last line is some time ago."""
        return time.monotonic() - self._time >= _SECONDS

    def add(self, place: Place) -> None:
        """Writes a line; the files must be on the disk up to there."""
        line = json.dumps([self._digests[place.source], *place])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._time = time.monotonic()

    def _place(self, line: str) -> Place | None:
        try:
            digest, source, documents, extents = json.loads(line)
        except ValueError:  # the process died while it wrote it
            return None
        if source >= len(self._digests) or self._digests[source] != digest:
            return None
        return Place(source, documents, {name: Extent(*each) for name, each in extents.items()})


def digests(settings: Any, sources: Sequence[Source]) -> list[str]:
    """Returns for every source what changes with the settings, the source and those before it."""
    hasher = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    result = []
    for source in sources:
        hasher.update(json.dumps([source.name, source.version]).encode())
        result.append(hasher.hexdigest())
    return result
