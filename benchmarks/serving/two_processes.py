"""What a server of two processes does when one dies, is told to end, or the network is slow.

  python benchmarks/serving/two_processes.py docs/two_processes.json [--only kill-0 slow ...]
      [--requests 36] [--clients 12] [--seed 0]
      [--mesh model=2] [--rules mlp:model,vocab:model] [--devices 1]

Mixed requests, those of same_texts.py, are sent by so many clients at once to two processes of CPU
devices. Once a third of them is answered, in turn

- kill-0, kill-1: a process gets SIGKILL. The other has to end with a line and status 1, no client
  may wait on, and what was answered whole must be right;
- term-0, term-1: a process gets SIGTERM. What was accepted has to be answered whole, later requests
  be refused, and both end with status 0;
- short-0, short-1: the same, with a --shutdown-timeout of 1 s: what is cut is a beginning;
- slow, slow-term-1, slow-kill-0: no signal, or one, where all that the processes send each other of
  requests passes a proxy that keeps each piece for 50 to 150 ms and hands it on 7 bytes at a time;
- still: where that network stands still for 45 s once, and then goes on.

Texts are compared with `LanguageModel.generate`, in float32. A row for each is written to the file
as it comes; exits with 1 where one is not as it has to be.
"""

import argparse
import asyncio
import collections
import json
import queue
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from same_texts import ask, expected, request
from servers import Server, ours

LINE = "neo-jax: another process of this run died or cannot be reached; start all of them again."
SLOW = {"least": 0.05, "most": 0.15, "piece": 7}
SCENARIOS: dict[str, dict[str, Any]] = {
    "kill-0": {"signal": "SIGKILL", "to": 0},
    "kill-1": {"signal": "SIGKILL", "to": 1},
    "term-0": {"signal": "SIGTERM", "to": 0},
    "term-1": {"signal": "SIGTERM", "to": 1},
    "short-0": {"signal": "SIGTERM", "to": 0, "shutdown_timeout": 1},
    "short-1": {"signal": "SIGTERM", "to": 1, "shutdown_timeout": 1},
    "slow": {"network": SLOW},
    "slow-term-1": {"signal": "SIGTERM", "to": 1, "network": SLOW},
    "slow-kill-0": {"signal": "SIGKILL", "to": 0, "network": SLOW},
    "still": {"network": {"stands_still_at": 30, "seconds": 45}},
}


def child(network: dict[str, Any], args: Sequence[str]) -> None:
    """Is `neo-jax`, where process 1 reaches process 0 through a proxy."""
    from neo_jax.cli import main
    from neo_jax.devices import channel

    def connect(*address: Any) -> socket.socket:
        made = socket.create_connection(*address)
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = socket.create_connection(server.getsockname())
            far, _ = server.accept()
        for source, target in ((made, far), (far, made)):
            source.settimeout(None)
            pieces: queue.SimpleQueue[bytes] = queue.SimpleQueue()
            threading.Thread(target=_read, args=(source, pieces), daemon=True).start()
            threading.Thread(target=_write, args=(target, pieces, network), daemon=True).start()
        return near

    replaced: Any = types.SimpleNamespace(**{**vars(socket), "create_connection": connect})
    channel.socket = replaced
    sys.exit(main(args))


def _read(source: socket.socket, pieces: "queue.SimpleQueue[Any]") -> None:
    data = b"-"
    while data:
        try:
            data = source.recv(1 << 16)
        except OSError:
            data = b""
        pieces.put((time.monotonic(), data))


def _write(
    target: socket.socket, pieces: "queue.SimpleQueue[Any]", network: dict[str, Any]
) -> None:
    rng, count = random.Random(0), 0
    while True:
        came, data = pieces.get()
        count += 1
        due = came + rng.uniform(network.get("least", 0), network.get("most", 0))
        time.sleep(max(due - time.monotonic(), 0))
        if count == network.get("stands_still_at"):
            time.sleep(network["seconds"])
        try:
            size = network.get("piece", 1 << 16)
            for start in range(0, len(data), size):
                target.sendall(data[start : start + size])
            if not data:
                target.shutdown(socket.SHUT_WR)
        except OSError:
            return
        if not data:
            return


async def load(
    server: Server, bodies: Sequence[dict[str, Any]], clients: int, after: int, act: Any
) -> list[tuple[str, list[str] | None]]:
    """Sends all; calls `act` once so many are answered. Returns what became of each, in order."""
    waiting = list(enumerate(bodies))[::-1]
    found: list[tuple[str, list[str] | None]] = [("", None)] * len(bodies)
    answered = 0

    async def work() -> None:
        nonlocal answered
        limits = httpx.Limits(max_connections=1)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            while waiting:
                i, body = waiting.pop()
                try:
                    found[i] = ("answered", await ask(client, body, leaves=False))
                except httpx.HTTPStatusError as error:
                    found[i] = (str(error.response.status_code), None)
                except httpx.ConnectError:
                    found[i] = ("no server", None)
                except (httpx.TransportError, KeyError):  # an error event has no choices
                    found[i] = ("broken off", None)
                else:
                    answered += 1
                    if answered == after:
                        act()

    await asyncio.gather(*(work() for _ in range(clients)))
    return found


def run(name: str, bodies: Sequence[dict[str, Any]], texts: Sequence[list[str]], args: Any) -> Any:
    """Returns a row of results."""
    scenario = SCENARIOS[name]
    options = ["--dtype", "float32", "--mesh", args.mesh, "--rules", args.rules]
    timeout = scenario.get("shutdown_timeout", 120)
    options += ["--max-sequences", "8", "--shutdown-timeout", str(timeout)]
    program = ("-m", "neo_jax")
    if "network" in scenario:
        program = (__file__, "--child", json.dumps(scenario["network"]))
    times: list[float] = []  # of the signal, and of the end of both
    with tempfile.NamedTemporaryFile("r") as log:
        with ours(
            *options, log=log.name, processes=2, program=program,
            env={"JAX_NUM_CPU_DEVICES": str(args.devices), "JAX_PLATFORMS": "cpu"},
        ) as server:  # fmt: skip
            processes = [server.process, *server.others]

            def wait() -> None:
                for process in processes:
                    process.wait()
                times.append(time.monotonic())

            waiting = threading.Thread(target=wait, daemon=True)

            def act() -> None:
                if "signal" in scenario:
                    times.append(time.monotonic())
                    processes[scenario["to"]].send_signal(getattr(signal, scenario["signal"]))
                    waiting.start()

            begin = time.monotonic()
            found = asyncio.run(load(server, bodies, args.clients, len(bodies) // 3, act))
            seconds = time.monotonic() - begin
            if not times:
                times.append(time.monotonic())
                server.process.send_signal(signal.SIGTERM)
                waiting.start()
            waiting.join(timeout=150)
            statuses = [process.poll() for process in processes]  # None: it hangs
        lines = [line for line in log.read().splitlines() if line]
    counts = collections.Counter(kind for kind, _ in found)
    refused = counts["503"] + counts["no server"]
    pairs = [(got, text) for (_, got), text in zip(found, texts, strict=True) if got is not None]
    beginnings = sum(
        got != text and all(whole.startswith(part) for part, whole in zip(got, text, strict=True))
        for got, text in pairs
    )
    row = {
        "scenario": name,
        "requests": len(bodies),
        "answered": len(pairs),
        "equal": sum(got == text for got, text in pairs),
        "beginnings": beginnings,
        "refused": refused,
        "broken off": len(bodies) - len(pairs) - refused,
        "seconds": round(seconds, 1),
        "seconds until both ended": round(times[-1] - times[0], 1),
        "statuses": statuses,
        "last line": lines[-1],
    }
    return row | {"good": is_good(row, scenario)}


def is_good(row: dict[str, Any], scenario: dict[str, Any]) -> bool:
    """Whether a row is as it has to be."""
    whole = row["equal"] == row["answered"] and not row["broken off"]
    if scenario.get("signal") == "SIGKILL":
        statuses = [1, 1]
        statuses[scenario["to"]] = -signal.SIGKILL
        known = row["equal"] == row["answered"] and row["answered"] >= row["requests"] // 3
        return known and (row["statuses"], row["last line"]) == (statuses, LINE)
    if "shutdown_timeout" in scenario:
        whole = row["equal"] + row["beginnings"] == row["answered"] and not row["broken off"]
    elif "signal" not in scenario:
        whole = whole and row["answered"] == row["requests"]
    return whole and row["statuses"] == [0, 0] and row["last line"].startswith("ending: ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--requests", type=int, default=36)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default="model=2")
    parser.add_argument("--rules", default="mlp:model,vocab:model")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by which servers are ended
    rng = random.Random(args.seed)
    bodies = [request(rng, 60) for _ in range(args.requests)]
    import neo_jax

    lm = neo_jax.load(dtype="float32")
    texts = [expected(lm, body) for body in bodies]
    rows = json.loads(args.results.read_text()) if args.results.exists() else []
    good = True
    for name in args.only:
        row = run(name, bodies, texts, args)
        rows = [old for old in rows if old["scenario"] != name] + [row]
        rows.sort(key=lambda row: list(SCENARIOS).index(row["scenario"]))
        args.results.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(row), flush=True)
        good &= row["good"]
    sys.exit(not good)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]), sys.argv[3:])
    main()
