"""Mixed load for long: memory, rows in use, and answers that are not 200.

  python benchmarks/serving/load.py [--seconds 3600] [--clients 24] [--model NAME]

Random requests as in same_texts.py, a tenth of which are left in the middle, next to scoring and
embedding. Prints the server's memory each minute, and how much it grew after the first five.
"""

import argparse
import asyncio
import random
import sys
import time

import httpx
from same_texts import ask, request
from servers import Server, ours


async def client(url: str, until: float, seed: int, counts: dict[str, int]) -> None:
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=600) as http:
        while time.monotonic() < until:
            body = request(rng, 250)
            kind = rng.random()
            try:
                if kind < 0.1:
                    score = {"prompt": body["prompt"], "max_tokens": 0, "echo": True, "logprobs": 1}
                    (await http.post("/v1/completions", json=score)).raise_for_status()
                elif kind < 0.2:
                    wanted = {"input": [body["prompt"]] * rng.randint(1, 3)}
                    (await http.post("/v1/embeddings", json=wanted)).raise_for_status()
                else:
                    await ask(http, body, leaves=kind > 0.9)
                counts["done"] += 1
            except httpx.HTTPError as error:
                counts["failed"] += 1
                print(f"{type(error).__name__}: {error}", file=sys.stderr)


async def watch(server: Server, until: float, counts: dict[str, int]) -> list[float]:
    sizes, begin = [], time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(min(60, max(until - time.monotonic(), 0)))
        sizes.append(server.megabytes())
        print(
            f"{(time.monotonic() - begin) / 60:5.1f} min  {sizes[-1]:7.0f} MB  "
            f"{counts['done']} answers, {counts['failed']} failed",
            flush=True,
        )
    return sizes


async def run(server: Server, args: argparse.Namespace) -> list[float]:
    counts = {"done": 0, "failed": 0}
    until = time.monotonic() + args.seconds
    clients = [client(server.url, until, seed, counts) for seed in range(args.clients)]
    sizes, *_ = await asyncio.gather(watch(server, until, counts), *clients)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--model", default="")
    args = parser.parse_args()
    options = ["--model", args.model] if args.model else []
    with ours(*options) as server:
        sizes = asyncio.run(run(server, args))
        time.sleep(2)
        counts = server.metrics()
    print(
        f"rows in use {counts['num_requests_running']:.0f}, waiting "
        f"{counts['num_requests_waiting']:.0f}; {counts['generation_tokens_total']:.0f} tokens"
    )
    if len(sizes) > 5:
        print(f"memory after 5 minutes {sizes[4]:.0f} MB, at the end {sizes[-1]:.0f} MB")
    sys.exit(counts["num_requests_running"] != 0)


if __name__ == "__main__":
    main()
