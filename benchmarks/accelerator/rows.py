"""Results as they come: a JSON line a row; of several rows of one name the last counts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""Figures by name, and what else there is to say: `note` (why this device has none), `failed` (a
result that is wrong) or `error` (why there is no result; another call tries again)."""

Key = tuple[str, str]  # the part, and the row's name in it


def read(path: Path) -> dict[Key, Row]:
    """Returns the rows of a file, none where there is no file; a line that was cut off is none."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row["part"], row["row"]] = row
    return found


def append(path: Path, key: Key, row: Mapping[str, Any]) -> None:
    """Adds a row at the end of a file."""
    line = json.dumps({"part": key[0], "row": key[1], **row})
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, 2) - 1))
        cut_off = file.read() not in (b"", b"\n")
        file.write(b"\n" * cut_off + line.encode() + b"\n")


def explain(error: Exception) -> str:
    """Returns an error as a row holds it: its kind and the beginning of what it says."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
