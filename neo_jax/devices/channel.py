"""Lines between process 0 of a run and all others, which end together when one of them dies.

Collectives could carry them, but a process that waits in one for hours burns a core, and platforms
give up waiting. So these are plain sockets: quick to notice a death, and idle without work.
"""

import contextlib
import hmac
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax._src import distributed

from neo_jax.devices.processes import START_TIMEOUT, from_leader, is_leader
from neo_jax.errors import NeoError, reason

_NOTICE = 2.0  # seconds after which the death of a process on another host is known by all
_GREETING = 5.0  # seconds in which who connects must say the secret


class Channel:
    """Process 0's connections to all others, or the one of another process."""

    def __init__(self, sockets: Sequence[socket.socket], on_loss: Callable[[], object]):
        """Begins to listen.

        Args:
          sockets: connected ones.
          on_loss: called by a thread, once, when a connection breaks before its end; it should end
            the process, of which another thread may wait for the others for ever.
        """
        self._sockets, self.on_loss = sockets, on_loss
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._losing = threading.Lock()
        self._lost, self._is_over = threading.Event(), False
        for each in sockets:
            each.settimeout(None)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._read, args=[each], name="channel", daemon=True).start()

    def send(self, line: bytes) -> None:
        """Sends a line, without its end, to whoever is connected."""
        try:
            for each in self._sockets:
                each.sendall(line + b"\n")
        except OSError:
            self._lose()

    def lines(self) -> Iterator[bytes]:
        """Yields what comes, in order, until the other side closes the channel.

        Raises:
          ConnectionError: a connection broke, and `on_loss` did not end the process.
        """
        while (line := self._lines.get()) is not None:
            yield line
        if self._lost.is_set():
            raise ConnectionError("a process of this run is gone.")

    def close(self) -> None:
        """Tells the others that this is the end: from now on they may leave."""
        self._is_over = True
        self.send(b"")

    def settle(self) -> None:
        """Returns if nobody died; else this process ends. A failed collective may be how it shows.

        `on_loss` is at work meanwhile.
        """
        if self._lost.wait(_NOTICE):
            threading.Event().wait()

    def _read(self, source: socket.socket) -> None:
        with contextlib.suppress(OSError), source.makefile("rb") as file:
            for line in file:
                if line == b"\n":
                    self._is_over = True
                    break
                if line.endswith(b"\n"):
                    self._lines.put(line[:-1])
        if not self._is_over:
            self._lose()
        self._lines.put(None)

    def _lose(self) -> None:
        if self._is_over or not self._losing.acquire(blocking=False):
            return
        self._lost.set()
        self.on_loss()


def connect(on_loss: Callable[[], object], timeout: float = START_TIMEOUT) -> Channel:
    """Connects process 0 with all others, which must all call this; see `Channel`.

    The port is a free one of process 0. Who does not know a secret of this run is turned away.

    Raises:
      NeoError: they do not reach each other.
    """
    with contextlib.ExitStack() as stack:
        port, secret, server = 0, [0] * 4, None
        if is_leader():
            server = stack.enter_context(_listen())
            port, secret = server.getsockname()[1], [secrets.randbits(31) for _ in secret]
        told = from_leader(np.array([port, *secret], np.int32))
        key = told[1:].tobytes()
        if server:
            return Channel(_accept(server, key, jax.process_count() - 1, timeout), on_loss)
        # It is process 0's. Where JAX found it out, nothing public says it.
        address = distributed.global_state.coordinator_address or ""
        host = address.rpartition(":")[0].strip("[]")
        try:
            made = socket.create_connection((host, int(told[0])), timeout)
            made.sendall(key)
        except OSError as error:
            raise NeoError(
                f"cannot reach process 0 at {host}:{told[0]}: {reason(error).rstrip('.')}; open "
                "all ports between the hosts of a run."
            ) from error
        return Channel([made], on_loss)


def _listen() -> socket.socket:
    """Returns a socket that listens on all addresses."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _accept(
    server: socket.socket, key: bytes, count: int, timeout: float
) -> Sequence[socket.socket]:
    """Returns so many connections of who knows the key."""
    deadline, found = time.monotonic() + timeout, list[socket.socket]()
    try:
        while len(found) < count:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            made, _ = server.accept()
            with contextlib.suppress(OSError):
                if hmac.compare_digest(_greeting(made, len(key)), key):
                    found.append(made)
                    continue
            made.close()
    except TimeoutError as error:
        raise NeoError(
            f"{count - len(found)} of {count} processes did not reach port "
            f"{server.getsockname()[1]} of process 0 in {timeout:g} s; open all ports between the "
            "hosts of a run."
        ) from error
    return found


def _greeting(source: socket.socket, size: int) -> bytes:
    """Returns so many bytes, which may come in pieces, or those before an end."""
    deadline, found = time.monotonic() + _GREETING, b""
    while len(found) < size:
        source.settimeout(max(deadline - time.monotonic(), 0.01))
        if not (new := source.recv(size - len(found))):
            break
        found += new
    return found
