"""A run of several processes on the command line: its options, its streams and its end.

When a process dies, JAX's runtime ends the others by abort(), each with a dozen lines of its own,
whatever Python does at that time. A user is to read one line: so what the libraries below Python
print goes to a file of this process, and abort() is noticed and explained.
"""

import contextlib
import dataclasses
import faulthandler
import os
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from neo_jax.cli import EXPECTED, UsageError, explain
from neo_jax.devices.processes import HEARTBEAT_TIMEOUT, START_TIMEOUT, is_leader, join, num_tasks
from neo_jax.errors import NeoError

_FATAL = b"the JAX distributed service detected fatal errors"

_STAND_STILL = struct.pack("ll", 0, 50_000)  # a timeval, for each write of faulthandler


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Where a mesh spans several processes; each of them runs the same command."""

    coordinator: str = "auto"  # HOST:PORT of process 0; auto: as the cluster says; mpi4py; none
    num_processes: int = 0  # of the run, with HOST:PORT
    process_id: int = -1  # of this process, from 0, with HOST:PORT
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT  # seconds until all end after one of them died
    start_timeout: int = START_TIMEOUT  # seconds in which all must come

    @contextlib.contextmanager
    def joined(self, on_mesh: bool, then: str = "") -> Iterator[Callable[[], None]]:
        """Joins the other processes of the run, if there are any, and leaves together with them.

        Without a mesh a process is on its own. Where there are others, an error ends the process
        here: the usual way out would wait for them.

        Args:
          on_mesh: whether there is a mesh.
          then: what happens when all are started again after one died.

        Yields:
          A function that ends this process, as it ends where JAX finds that another one died.

        Raises:
          NeoError: see `neo_jax.devices.processes.join`; or a coordinator without a mesh.
        """
        if not on_mesh:
            several = num_tasks() > 1 and self.coordinator == "auto"
            if several or self.num_processes > 1:
                raise UsageError(
                    "this is one of several processes, and they need a mesh to share; add for "
                    "example --mesh fsdp=-1, or --coordinator none to let each run alone."
                )
            yield _nobody
            return
        log, restore = _divert()
        several = False
        try:
            said = _on_abort(log)
            said.append(
                f"not all processes of this run came within {self.start_timeout} s, or process 0 "
                "cannot be reached; start the same command for each of them, or give "
                "--coordinator none to run alone.",
            )
            several = join(**dataclasses.asdict(self))
        finally:
            if not several:
                restore()
        if not several:
            yield _nobody
            return
        said.append(
            "another process of this run died or cannot be reached; start all of them again"
            f"{then}.",
        )
        with self._ending():
            yield lambda: _end(said)

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Lets process 0 alone print results; ends this process where an error leaves the run."""
        if not is_leader():
            sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        try:
            yield
            sys.stdout.flush()
            jax.distributed.shutdown()  # waits for the others
        except EXPECTED as error:
            os._exit(explain(error))
        except BaseException as error:
            try:
                # It may be how the death of another process shows first: then JAX will say so.
                time.sleep(self.heartbeat_timeout)
            finally:
                traceback.print_exception(error)
                os._exit(1)


_ENDING = threading.Lock()  # of whoever says first why the process ends


def _end(lines: list[str]) -> NoReturn:
    """Ends the process with the last of some lines."""
    _ENDING.acquire()
    explain(NeoError(lines[-1]))
    os._exit(1)


def _nobody() -> None:
    """Is what ends a process when another one died, where there is no other."""


def _divert() -> tuple[int, Callable[[], None]]:
    """Sends what is not Python's own to a file without a name, such as what gloo says on stdout.

    Returns:
      The file's descriptor, and a function that takes everything back.
    """
    before = sys.stdout, sys.stderr
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("log")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    copies = os.dup(1), os.dup(2)
    for stream in before:
        stream.flush()
    sys.stdout, sys.stderr = (os.fdopen(copy, "w", 1, encoding="utf-8") for copy in copies)
    os.dup2(fd, 1)
    os.dup2(fd, 2)

    def restore() -> None:
        faulthandler.disable()
        os.dup2(copies[0], 1)
        os.dup2(copies[1], 2)
        sys.stdout.close()
        sys.stderr.close()
        sys.stdout, sys.stderr = before
        os.write(2, os.pread(fd, os.fstat(fd).st_size, 0))
        os.close(fd)

    return fd, restore


def _on_abort(log: int) -> list[str]:
    """Turns JAX's abort() into a line and exit status 1; any other goes on, its reason shown.

    A handler of Python's would run after the end. That of faulthandler is C and writes to a socket,
    which is soon full: there the thread that aborts stands still for long enough that another one,
    which waits for the first byte, can read what was said in the log of `_divert`.

    Returns:
      A list, the last entry of which is to be the line.
    """
    lines: list[str] = []
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as there is
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _STAND_STILL)
    # As a descriptor, which stays open as long as the process may abort; of one thread, since it
    # reads what others go on changing.
    faulthandler.enable(near.detach(), all_threads=False)

    def watch() -> None:
        if not far.recv(1, socket.MSG_PEEK):
            return
        words = os.pread(log, os.fstat(log).st_size, 0)
        if _FATAL in words:
            _end(lines)
        os.write(sys.stderr.fileno(), words)
        far.close()

    threading.Thread(target=watch, name="aborts", daemon=True).start()
    return lines
