"""Servers as their users start them: a process, an address, and what it says of itself."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path


class Server:
    """A process that answers at an address."""

    def __init__(self, process: subprocess.Popen, url: str, seconds: float):
        self.process, self.url, self.seconds = process, url, seconds  # until it was ready
        self.others: list[subprocess.Popen] = []  # processes of the same run

    def metrics(self) -> dict[str, float]:
        """The counters and gauges, without labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if not line.startswith("#") and "le=" not in line:
                name = line.split("{")[0].removeprefix("vllm:")
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return found

    def megabytes(self) -> float:
        """Its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextlib.contextmanager
def run(
    command: Sequence[str],
    port: int,
    ready: str = "/health",
    seconds: float = 600,
    log: str = os.devnull,
    env: dict[str, str] | None = None,
) -> Iterator[Server]:
    """Runs a server until the context ends, which it leaves by SIGTERM."""
    url, begin = f"http://127.0.0.1:{port}", time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | (env or {})
        )
        try:
            while True:
                with (
                    contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                    urllib.request.urlopen(url + ready, timeout=5) as answer,
                ):
                    if answer.status == 200:
                        break
                if process.poll() is not None or time.monotonic() - begin > seconds:
                    said = Path(log).read_text(errors="replace")[-500:]
                    raise RuntimeError(f"{' '.join(command)} does not answer; {log}: {said}")
                time.sleep(0.02)
            yield Server(process, url, time.monotonic() - begin)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def ours(
    *options: str,
    log: str = os.devnull,
    env: dict[str, str] | None = None,
    processes: int = 1,
    program: Sequence[str] = ("-m", "neo_jax"),
) -> Iterator[Server]:
    """`neo-jax serve` with these options, by so many processes."""
    port = free_port()
    command = [sys.executable, *program, "serve", "--port", str(port), *options]
    where, others = [], []
    if processes > 1:
        where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", str(processes)]
    with open(log, "ab") as out:
        try:
            for i in range(1, processes):
                each = [*command, *where, "--process-id", str(i)]
                environment = os.environ | (env or {})
                others.append(subprocess.Popen(each, stdout=out, stderr=out, env=environment))
            first = [*command, *where, *(["--process-id", "0"] if where else [])]
            with run(first, port, log=log, env=env) as server:
                server.others = others
                yield server
        finally:
            for each in others:
                try:
                    each.wait(timeout=60)  # it ends with the first
                except subprocess.TimeoutExpired:
                    each.kill()


@contextlib.contextmanager
def theirs(*options: str, log: str = os.devnull) -> Iterator[Server]:
    """`transformers serve` with these options."""
    port = free_port()
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", "--port", str(port), *options
    ]  # fmt: skip
    with run(command, port, log=log) as server:
        yield server
