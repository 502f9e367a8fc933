"""A port, a loop that answers at it, and an end in which no accepted request is lost."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator

import uvicorn

from neo_jax.devices.signals import taken
from neo_jax.errors import NeoError, reason
from neo_jax.serving.app import make_app
from neo_jax.serving.service import Service

_LEAVE = 5.0  # seconds in which answers that are complete reach slow clients


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket that has a port, where nobody is answered yet.

    Args:
      host: a name or an address, of IPv6 too.
      port: 0 takes a free one.

    Raises:
      NeoError: there is no such host here, or another program has the port.
    """
    made = None
    try:
        flags = socket.AI_PASSIVE
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=flags
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        if made is not None:
            made.close()
        raise _no_port(host, port, error) from error
    return made


def url(bound: socket.socket) -> str:
    """Returns the address of a socket that `bind` returned."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    service: Service,
    bound: socket.socket,
    shutdown_timeout: float,
    on_ready: Callable[[], None],
    on_end: Callable[[], None],
    ends: Iterable[object] = (),
) -> None:
    """Answers requests until a signal comes: SIGTERM, or Ctrl-C; a second one ends at once.

    Args:
      service: what is served; its engine has started.
      bound: what `bind` returned.
      shutdown_timeout: seconds that requests have, after the signal, to be finished.
      on_ready: called as soon as clients can connect.
      on_end: called as soon as the signal comes, maybe by another thread.
      ends: whose next item, which a thread waits for, is as good as a signal.

    Raises:
      NeoError: another program has taken the port meanwhile, or the engine has failed.
    """

    async def run() -> None:
        config = uvicorn.Config(
            make_app(service),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # what clients do wrong is not for the log
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(_LEAVE),
        )
        server, loop = _Server(config, on_ready), asyncio.get_running_loop()
        first = threading.Lock()

        def in_thread(work: Callable[[], object]) -> None:
            # A thread of its own, for which nobody waits who is to end at once.
            threading.Thread(target=work, daemon=True).start()

        def stop_after(work: Callable[[], None]) -> None:
            work()
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(server.stop)

        def end() -> bool:
            if first.acquire(blocking=False):
                on_end()
                in_thread(lambda: stop_after(lambda: service.engine.drain(shutdown_timeout)))
            return True

        in_thread(lambda: stop_after(service.engine.wait))
        in_thread(lambda: [end() for _ in ends])
        with taken(end):
            await server.serve(sockets=[bound])

    try:
        asyncio.run(run())
    except OSError as error:
        host, port = bound.getsockname()[:2]
        raise _no_port(host, port, error) from error
    if service.engine.has_failed:
        raise NeoError("the model has failed, as the log says; start the server again.")


class _Server(uvicorn.Server):
    """A server that leaves signals to others."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        self._on_ready()

    def stop(self) -> None:
        """Ends as soon as connections are closed."""
        self.should_exit = True


def _no_port(host: str, port: int, error: Exception) -> NeoError:
    return NeoError(
        f"cannot listen on {host}:{port}: {reason(error).rstrip('.')}; name another --port or "
        "--host."
    )
