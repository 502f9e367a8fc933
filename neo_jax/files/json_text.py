"""JSON that others wrote, within bounds: no text may fill the memory or end the program."""

import json
import os
from typing import Any

from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import is_file, make_path, open_binary

MOST_BYTES = 10_000_000
"""The longest text that is read; in memory it may take thirty times as much."""


def parse_json(text: bytes, source: str) -> Any:
    """Returns the value that a text in UTF-8 holds; errors name its source.

    Raises:
      NeoError: it is no JSON, longer than `MOST_BYTES`, or nested about a thousand deep.
    """
    if len(text) > MOST_BYTES:
        raise NeoError(
            f"{source} holds more than {MOST_BYTES / 1e6:g} MB of JSON, which no model needs; is "
            "it the right file?"
        )
    try:
        return json.loads(text.decode("utf-8"))
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = reason(error)
    raise NeoError(f"{source} is not valid JSON ({why}); is the file whole?")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      NeoError: the file is missing, unreadable, or holds no JSON object.
    """
    place = make_path(path)
    if not is_file(place):
        raise NeoError(f"cannot read {path}: No such file.")
    try:
        with open_binary(place) as file:
            text = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    fields = parse_json(text, str(path))
    if not isinstance(fields, dict):
        raise NeoError(f"{path} holds a {type(fields).__name__}, not a JSON object.")
    return fields
