"""What clients do wrong to a server, and what it does then.

  python benchmarks/serving/faults.py [--mutations 2000] [--seed 0]

Mutated requests (wrong types, fields, bytes, nesting, lengths; never a 500, never without an
answer), bodies of 10 MB, slow ones, floods of headers, bad UTF-8; killed clients, streaming
and not, whose rows must be free within a step; a full queue; wrong keys; SIGTERM under load, which
must lose no accepted request.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import time
from typing import Any

import httpx
from servers import Server, ours

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "bundled", "prompt": "The people", "max_tokens": 3, "n": 1, "stream": False,
        "temperature": 0.5, "top_p": 0.9, "logprobs": 2, "stop": ["x"], "seed": 1,
        "logit_bias": {"5": 1}, "echo": True, "stream_options": None, "presence_penalty": 0.1,
    },
    "/v1/chat/completions": {
        "model": "bundled", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3,
        "logprobs": True, "top_logprobs": 2, "temperature": 1,
    },
    "/v1/embeddings": {"model": "bundled", "input": ["The people"], "encoding_format": "float"},
    "/tokenize": {"prompt": "The people", "add_special_tokens": False},
    "/detokenize": {"tokens": [5, 6, 7]},
}  # fmt: skip


def odd(rng: random.Random) -> Any:
    """A value that somebody might send."""
    nested: Any = 0
    for _ in range(rng.choice([2, 50, 3000])):
        nested = [nested]
    return rng.choice(
        [
            None, True, -1, 0, 2**31, 2**63, 2**70, 1e308, -0.0, 0.5, "", "\x00", "é🚀" * 50,
            "\ud800", [], [[]], {}, {"a": {}}, [None], [1, "x"], [-5], [10**9], [True], nested,
            "a" * 20_000, list(range(3000)), float("nan"), float("inf"), {"role": 5}, [{}]
        ]
    )  # fmt: skip


def mutated(rng: random.Random, body: dict[str, Any]) -> bytes:
    body = json.loads(json.dumps(body))
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([*body, "".join(rng.choices(string.ascii_letters, k=6)), "n", "user"])
        if rng.random() < 0.2:
            body.pop(name, None)
        else:
            body[name] = odd(rng)
    try:
        text = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"[" * 100_000
    kind = rng.random()
    if kind < 0.1:  # some bytes are others
        changed = bytearray(text)
        for _ in range(rng.randint(1, 5)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind < 0.15:
        return text[: rng.randrange(len(text))]
    return text


async def mutations(url: str, count: int, seed: int) -> None:
    rng, statuses = random.Random(seed), {}
    requests = [
        (path, mutated(rng, body)) for path, body in rng.choices(list(BODIES.items()), k=count)
    ]

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            while requests:
                path, body = requests.pop()
                answer = await client.post(path, content=body)
                statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
                if answer.status_code >= 500:
                    print(f"{answer.status_code} for {path} {body[:300]!r}: {answer.text[:200]}")
                elif answer.status_code >= 400:
                    assert answer.json()["error"]["message"], (path, body)

    await asyncio.gather(*(work() for _ in range(8)))
    print(f"{count} mutated requests: {dict(sorted(statuses.items()))}", flush=True)
    assert not any(status >= 500 for status in statuses)


def raw(server: Server, data: bytes, wait: float = 10, slow: float = 0) -> str:
    """The first line that a server answers to bytes."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        try:
            for piece in [data[i : i + 16] for i in range(0, len(data), 16)] if slow else [data]:
                connection.sendall(piece)
                time.sleep(slow)
            return connection.recv(200).decode(errors="replace").split("\r\n")[0]
        except (TimeoutError, ConnectionError) as error:
            return type(error).__name__


def protocol(server: Server) -> None:
    """What is not HTTP, or too much of it."""
    post = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n"
    bad = b'{"prompt": "\xff\xfe"}'
    large = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a" * 10_000_000})
    print(f"10 MB: {large.status_code}")
    flood = b"GET /health HTTP/1.1\r\n" + b"x-a: " + b"b" * 60 + b"\r\n"
    flood += b"".join(b"x-%d: y\r\n" % i for i in range(20_000)) + b"\r\n"
    for name, data in {
        "20,000 headers": flood,
        "bad UTF-8": post.format(len(bad)).encode() + bad,
        "nested 100,000 deep": post.format(100_000).encode() + b"[" * 100_000,
        "no HTTP": b"\x16\x03\x01\x02\x00" * 40 + b"\r\n\r\n",
    }.items():
        print(f"{name}: {raw(server, data)}", flush=True)
    body = b'{"prompt": "slow", "max_tokens": 1}'
    begin = time.monotonic()
    line = raw(server, post.format(10_000).encode() + body, wait=45)
    print(f"a body that does not come: {line} after {time.monotonic() - begin:.0f} s")
    assert httpx.get(f"{server.url}/health").status_code == 200


def killed(server: Server) -> None:
    """curl, killed in the middle: how long until its row is free."""
    for stream in (True, False):
        waits = []
        for _ in range(10):
            body = {"prompt": "The people", "max_tokens": 900, "stream": stream}
            command = ["curl", "-sN", f"{server.url}/v1/completions", "-d", json.dumps(body)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            while not server.metrics()["num_requests_running"]:
                time.sleep(0.01)
            time.sleep(0.2)
            process.kill()
            begin = time.monotonic()
            while server.metrics()["num_requests_running"]:
                time.sleep(0.001)
            waits.append(time.monotonic() - begin)
            process.wait()
        typical, most = 1e3 * statistics.median(waits), 1e3 * max(waits)
        words = f"a row is free after {typical:.0f} ms, at most {most:.0f} ms"
        print(f"killed clients, stream {stream}: {words}", flush=True)


async def full(url: str) -> None:
    """A queue of two."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        body = {"prompt": "The people", "max_tokens": 300}
        answers = await asyncio.gather(
            *(client.post("/v1/completions", json=body) for _ in range(12))
        )
    statuses = sorted(answer.status_code for answer in answers)
    refused = [answer for answer in answers if answer.status_code == 503]
    assert refused
    assert all("retry-after" in answer.headers for answer in refused)
    assert set(statuses) == {200, 503}
    print(f"a full queue: {statuses.count(200)} answered, {len(refused)} got 503 with Retry-After")


async def ending(server: Server) -> None:
    """SIGTERM while 24 requests are being served."""

    async def ask(client: httpx.AsyncClient, seed: int) -> str:
        body = {"prompt": "The people", "max_tokens": 40 + seed, "stream": seed % 2 == 0}
        try:
            answer = await client.post("/v1/completions", json=body)
        except httpx.TransportError as error:
            return type(error).__name__
        if answer.status_code != 200:
            return str(answer.status_code)
        return "whole" if "[DONE]" in answer.text or answer.json()["choices"] else "cut"

    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        tasks = [asyncio.create_task(ask(client, seed)) for seed in range(24)]
        while sum(server.metrics()[f"num_requests_{n}"] for n in ("running", "waiting")) < 24:
            await asyncio.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        found = await asyncio.gather(*tasks)
    status = await asyncio.to_thread(server.process.wait, 60)
    print(f"SIGTERM under load: {found.count('whole')} of 24 whole, exit status {status}")
    assert (found.count("whole"), status) == (24, 0), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with ours("--chat-template", "plain") as server:
        asyncio.run(mutations(server.url, args.mutations, args.seed))
        protocol(server)
        killed(server)
        with contextlib.suppress(ProcessLookupError):
            asyncio.run(ending(server))
    with ours("--max-sequences", "1", "--max-queued-requests", "2") as server:
        asyncio.run(full(server.url))
    with ours("--api-key", "right") as server:
        for key, status in (("wrong", 401), ("", 401), ("right", 200)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == status
        print("keys: a wrong one and none are 401")


if __name__ == "__main__":
    sys.exit(main())
