"""The errors a user can cause. The command line prints them as one line, without a traceback."""

import difflib
import operator
import reprlib
import warnings
from collections.abc import Iterable
from typing import Any

_LONGEST = 2000  # characters of a message; a name in a file may have millions


class NeoError(ValueError):
    """Something in the user's hands: a file, an option, a prompt. Its message says what to do.

    Names come from files that others wrote: what would not show in a line is escaped, and of a
    message that is too long the middle is left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
        super().__init__(printable(message))


class NeoWarning(UserWarning):
    """What is left out or not followed of a user's files. The command line prints it as a line."""


def warn(message: str) -> None:
    """Warns of something in a user's files, once a process."""
    warnings.warn(str(NeoError(message)), NeoWarning, stacklevel=2)


def printable(text: str) -> str:
    """Returns a text with control characters, and all else that does not show, escaped."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


_KINDS = {
    int: (operator.index, "a whole number"),
    float: (lambda value: value.__float__(), "a number"),
}


def checked(name: str, value: Any, kind: type) -> Any:
    """Returns a number, a library's too, as Python's of this kind, int or float.

    Raises:
      NeoError: it is something else, True and texts included.
    """
    if type(value) is kind:
        return value
    convert, words = _KINDS[kind]
    try:
        if not isinstance(value, bool):
            return convert(value)
    except (TypeError, AttributeError, OverflowError):
        pass
    raise NeoError(f"{name} must be {words}, not {brief(value)}.")


def brief(value: object) -> str:
    """Returns a value as Python writes it, in a line of some words at most."""
    try:
        return " ".join(reprlib.repr(value).split())
    except ValueError:  # a number of more digits than Python writes
        return f"a huge {type(value).__name__}"


def suggest(name: object, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known name nearest to `name`, or lists a few of them."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name)[:100], known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known are: {', '.join(known)}."


def reason(error: BaseException) -> str:
    """Returns in one line why something failed: what the system says, or else the exception."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # a cloud's says the address that it requested
        return "No such file, folder or bucket"
    return " ".join(str(error).split()) or type(error).__name__
