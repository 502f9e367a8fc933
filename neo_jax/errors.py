"""The errors a user can cause. The command line prints them as one line, without a traceback."""

import difflib
from collections.abc import Iterable


class NeoError(ValueError):
    """Something in the user's hands: a file, an option, a prompt. Its message says what to do."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns " Did you mean 'x'?" for the known name nearest to `name`, or lists a few of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else f" Known are: {', '.join(known)}."


def reason(error: BaseException) -> str:
    """Returns in one line why something failed: what the system says, or else the exception."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):  # a cloud's says the address that it asked
        return "No such file, folder or bucket"
    return " ".join(str(error).split()) or type(error).__name__
