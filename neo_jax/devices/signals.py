"""Ctrl-C and SIGTERM: what they do to a command, decided in one place, from its first line on.

A Python handler runs late, while the main thread compiles; and what it raises comes out of whatever
runs: an import, which takes it for its own failure, a callback of the runtime, which loses it or
crashes. So handlers here do nothing: C writes a signal's number to a pipe, and a thread reads it:

1. What has taken signals gets the first one: a training loop, which saves and ends.
2. Else the main thread gets a KeyboardInterrupt at the next place where that is safe.
3. If it reaches none within a second, or has not ended after five, or a second signal comes, the
   thread prints a line and ends the process.

`timeout` and batch systems send SIGTERM to a process and then to its group: twice is once there.
"""

import atexit
import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STATUS = 130
"""The exit status of a command that was interrupted."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REACH, _LEAVE = 1.0, 4.0  # seconds to a safe place, and from there to the end
_POLL = 0.02  # seconds between two looks for one
_AGAIN = 1.0  # seconds within which SIGTERM is the one before

# In their frames, or in frames that they have called, an exception may be lost or crash.
_UNSAFE = {
    "jax", "jaxlib", "flax", "optax", "orbax", "sentencepiece", "tokenizers",
    "importlib", "_frozen_importlib", "_frozen_importlib_external", "weakref",
}  # fmt: skip


class _Repeats:
    """Knows which signals say only what the one before said."""

    def __init__(self) -> None:
        self._last = -math.inf

    def note(self, number: int) -> bool:
        """Notes a signal; returns whether it is one of these."""
        if number != signal.SIGTERM:
            return False
        last, self._last = self._last, time.monotonic()
        return self._last - last < _AGAIN


class Watch:
    """Watches for signals, from `start` to the end of the process."""

    def __init__(self) -> None:
        """Watches for nothing yet."""
        self.is_on = False
        self.takes: Callable[[], bool] | None = None  # see `taken`
        self.hint = ""  # of the line that the thread prints: "; so many are kept"
        self._inside = False  # where the main thread may get a KeyboardInterrupt
        self._raised = self._ending = self._reported = False
        self._pipe = self._main = -1
        self._repeats = _Repeats()

    def start(self) -> None:
        """Begins; the main thread must call this."""
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self.install()
        signal.signal(signal.SIGALRM, self._interrupt)
        atexit.register(_ignore)  # the first is called last
        import threading  # after the pipe, which keeps what comes meanwhile

        self._main = threading.get_ident()
        threading.Thread(target=self._run, name="signals", daemon=True).start()
        self.is_on = True

    def install(self) -> None:
        """Makes C write to the pipe, also where a library has since put its own handlers."""
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's jobs in the background
                signal.signal(number, lambda *_: None)

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Within this context the main thread may get a KeyboardInterrupt, also at its end."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def tell(self) -> bool:
        """Returns whether the caller is the one to print that the command was interrupted."""
        reported, self._reported = self._reported, self.is_on
        return not reported

    def end(self, status: int) -> None:
        """Ends the process with a status, or as one that was interrupted, which says so once."""
        if self._ending:  # the usual way out would wait for threads
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
            self._force()
        sys.exit(status)

    def _run(self) -> None:
        while self._next() and self.takes:
            takes, self.takes = self.takes, None
            if not takes():
                break
        self._ending = True
        if self._inside:
            signal.pthread_kill(self._main, signal.SIGALRM)
            if not self._next(_REACH) and self._raised:
                self._next(_LEAVE)
        self._force()

    def _next(self, seconds: float | None = None) -> bool:
        """Waits for the next signal; returns whether one came in time."""
        import select

        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._pipe], [], [], left)[0]:
                return False
            number = os.read(self._pipe, 1)[0]
            if number in _SIGNALS and not self._repeats.note(number):
                return True

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        """Raises a KeyboardInterrupt in the main thread where that is safe, or looks again soon."""
        if self._raised or not self._inside:
            return
        if _is_safe(frame):
            self._raised = True
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, _POLL)

    def _force(self) -> None:
        if self.tell():
            show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            line = f"{show_cursor}neo-jax: interrupted{self.hint}\n"
            with contextlib.suppress(OSError):
                os.write(_stderr(), line.encode())
        os._exit(STATUS)


def _stderr() -> int:
    try:
        return sys.stderr.fileno()  # one of several processes has it elsewhere
    except (OSError, ValueError, AttributeError):  # it is redirected into a text
        return 2


def _ignore() -> None:
    """Lets an interpreter that is going down do so; it would take our handlers away before."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _is_safe(frame: FrameType | None) -> bool:
    while frame:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _UNSAFE or frame.f_code.co_name == "__del__":
            return False
        frame = frame.f_back
    return True


WATCH = Watch()
"""Of this process; off where the package is used from Python."""


@contextlib.contextmanager
def taken(takes: Callable[[], bool]) -> Iterator[None]:
    """Within this context the first signal calls a function, which returns whether that is all.

    A second one acts as it would without this. Without `WATCH` only the main thread can take them.
    """
    if WATCH.is_on:
        WATCH.install()
        WATCH.takes = takes
        try:
            yield
        finally:
            WATCH.takes = None
        return
    import threading

    before: dict[int, Any] = {}
    repeats = _Repeats()
    is_first = True

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def take(number: int, _: object) -> None:
        nonlocal is_first
        if repeats.note(number):
            return
        if is_first:
            is_first = False
            takes()
        else:
            restore()
            signal.raise_signal(number)

    if threading.current_thread() is threading.main_thread():
        before.update({number: signal.signal(number, take) for number in _SIGNALS})
    try:
        yield
    finally:
        restore()
