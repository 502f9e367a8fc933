"""The command line, `neo-jax VERB`: a module a verb, imported when it is called.

Results go to stdout, progress and logs to stderr. What a user can cause is answered by one line
that says how to fix it, and exit status 1; a command that cannot be understood by status 2.
"""

import contextlib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from neo_jax import __version__
from neo_jax.cli.usage_errors import as_typed, one_line
from neo_jax.devices.signals import STATUS, WATCH
from neo_jax.errors import NeoError, NeoWarning, reason, suggest

T = TypeVar("T")

VERBS = {
    "generate": "continue a prompt, or many",
    "score": "log-probabilities of given texts",
    "chat": "a conversation in the terminal",
    "serve": "an OpenAI-compatible server",
    "eval": "how well a model predicts texts, and does the tasks of the harness",
    "info": "what a checkpoint holds",
    "classify": "labels of texts, by a classifier",
    "recipe": "examples, a run, answers and their scores, by one config",
    "prepare": "text to a tokenized data set",
    "train": "train by a config",
    "bench": "tokens/s of a model here, next to what the devices can do",
    "plan": "what a step takes of devices that need not be here",
    "quantize": "a checkpoint of int8 weights",
    "convert": "a checkpoint of any format to Hugging Face's; a config of EleutherAI/gpt-neo",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb = args[0] if args else "--help"
    if verb in ("-h", "--help"):
        print(_usage())
        return 0 if args else 2
    if verb in ("-V", "--version"):
        print(f"neo-jax {__version__}")
        return 0
    # This process is ours: what orbax's threads log, at length, they also raise.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        if verb not in VERBS:
            raise UsageError(f"'{verb}' is not a verb.{suggest(verb, VERBS)}")
        with WATCH.inside(), _warnings_as_lines():
            importlib.import_module(f"neo_jax.cli.{verb}").main(args[1:])
        return 0
    except EXPECTED as error:
        return explain(error, args[1:])
    except UnicodeEncodeError as error:
        if error.encoding in ("utf-8", "utf_8"):
            raise
        char = error.object[error.start]
        fix = "set PYTHONIOENCODING=utf-8, or write a file by --output"
        return explain(NeoError(f"what is printed is {error.encoding}, without {char!r}; {fix}."))
    except OSError as error:  # a full disk, a file that has gone, a name too long
        if error.errno is None:
            raise  # of a library, and not of the system
        where = f"{error.filename}: " if error.filename else ""
        return explain(
            NeoError(f"{where}{reason(error)}; check the path, the disk and the rights.")
        )


class UsageError(NeoError):
    """A command line that cannot be understood."""


EXPECTED = (NeoError, KeyboardInterrupt, BrokenPipeError)
"""What may end a command without being a fault of the program."""


def explain(error: BaseException, args: Sequence[str] = ()) -> int:
    """Prints one line for an error of `EXPECTED`, of these options; returns the exit status."""
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    interrupted = isinstance(error, KeyboardInterrupt)
    if interrupted and not WATCH.tell():
        return STATUS
    words = [*(["interrupted"] if interrupted else []), *map(str, error.args)]
    print(f"neo-jax: {as_typed('; '.join(words), args)}", file=sys.stderr, flush=True)
    if interrupted:
        return STATUS
    return 2 if isinstance(error, UsageError) else 1


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Lets warnings of a user's files look as errors do, without a place in the program."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if issubclass(category, NeoWarning):
                print(f"neo-jax: {message}", file=sys.stderr, flush=True)
            else:
                show(message, category, *rest)

        warnings.showwarning = show_line  # type: ignore[assignment]
        yield


def parse(kind: type[T], verb: str, args: Sequence[str], **options: Any) -> T:
    """Reads options into a dataclass; prints its help and exits where `--help` is among them.

    Raises:
      UsageError: unknown options or values, in one line.
    """
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=args, prog=f"neo-jax {verb}", **options)
    except SystemExit as exit_:
        if exit_.code:
            own = _own(exit_)
            raise UsageError(str(own) if own else one_line(errors.getvalue(), verb)) from None
        raise
    except NeoError as error:  # from the dataclass: a value that cannot be
        raise UsageError(str(error)) from None


def _own(error: BaseException | None) -> NeoError | None:
    """Returns the error of ours that a library's is about, whose words it would wrap."""
    while error is not None and not isinstance(error, NeoError):
        error = error.__context__
    return error


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    return (
        "usage: neo-jax VERB [OPTIONS]\n\n"
        f"{verbs}\n\n"
        "neo-jax VERB --help lists the options of a verb; neo-jax --version prints the version."
    )
