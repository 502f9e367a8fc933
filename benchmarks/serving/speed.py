"""Tokens a second and time to the first token, next to `transformers serve`; prints a table.

  python benchmarks/serving/speed.py [--models gpt-neo-125m gpt2] [--dtypes float32 bfloat16]
      [--clients 1 4 16] [--rounds 3] [--prompt 64] [--new 64] [--offline]

Both servers have the same folder, of drawn weights, and the same greedy requests, streamed: every
client sends its next one as soon as it has the last. They take turns, one idle while the other
works. transformers serves GPT-2 with --continuous-batching, which its GPT-Neo has not. Ratios are
medians over rounds of ours over theirs; above 1 is faster, and for the time to the first token,
longer. --offline compares the server with `LanguageModel.samples` on the same requests.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
from models import make
from servers import ours, theirs

EACH = {1: 3, 4: 3, 16: 2}  # requests that a client sends in a round


class Round(NamedTuple):
    tokens: float  # a second
    first: float  # seconds to the first token, the median


def bodies(count: int, model: str, prompt: int, new: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 50257, (count, prompt))
    return [
        {
            "model": model,
            "prompt": " ".join(f"w{i}" for i in row),
            "max_tokens": new,
            "temperature": 0,
            "stream": True,
        }
        for row in rows
    ]


async def load(url: str, requests: list[dict], clients: int) -> Round:
    waiting, firsts = list(requests), []

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as client:
            while waiting:
                body, begin, first = waiting.pop(), time.monotonic(), 0.0
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    assert answer.status_code == 200, await answer.aread()
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {") and not first:
                            choices = json.loads(line[6:]).get("choices")
                            if choices and choices[0].get("text"):
                                first = time.monotonic() - begin
                firsts.append(first)

    begin = time.monotonic()
    await asyncio.gather(*(work() for _ in range(clients)))
    seconds = time.monotonic() - begin
    new = sum(body["max_tokens"] for body in requests)
    return Round(new / seconds, statistics.median(firsts))


def compare(folder: Path, dtype: str, args: argparse.Namespace, name: str) -> None:
    """Prints a line for each number of clients."""
    batching = [] if "neo" in name else ["--continuous-batching"]
    log = os.environ.get("LOG", os.devnull)
    options = [str(folder), "--device", "cpu", "--dtype", dtype, *batching]
    with (
        ours("--model", str(folder), "--dtype", dtype, log=log) as mine,
        theirs(*options, log=log) as other,
    ):
        for clients in args.clients:
            found: dict[str, list[Round]] = {"ours": [], "theirs": []}
            for turn in range(args.rounds + 1):  # the first round compiles, and is not counted
                for side, server in (("ours", mine), ("theirs", other)):
                    count = clients * EACH.get(clients, 2)
                    asked = bodies(count, str(folder), args.prompt, args.new, turn)
                    made = asyncio.run(load(server.url, asked, clients))
                    if turn:
                        found[side].append(made)
            rates, waits = (
                [getattr(a, field) / getattr(b, field)
                 for a, b in zip(found["ours"], found["theirs"], strict=True)]
                for field in Round._fields
            )  # fmt: skip
            ours_, theirs_ = (
                Round(*map(statistics.median, zip(*found[side], strict=True)))
                for side in ("ours", "theirs")
            )
            print(
                f"| {name} | {dtype} | {clients} | {ours_.tokens:.1f} | {theirs_.tokens:.1f} | "
                f"{statistics.median(rates):.2f} | {ours_.first:.3f} | {theirs_.first:.3f} | "
                f"{statistics.median(waits):.2f} |",
                flush=True,
            )


def offline(folder: Path, dtype: str, args: argparse.Namespace, name: str) -> None:
    """Prints a line: the server with 16 clients next to texts that are written by one call."""
    import neo_jax
    from neo_jax.decode.options import SamplingOptions

    lm = neo_jax.load(str(folder), dtype=dtype)
    rates = []
    with ours("--model", str(folder), "--dtype", dtype) as server:
        for turn in range(args.rounds + 1):
            asked = bodies(64, str(folder), args.prompt, args.new, turn)
            served = asyncio.run(load(server.url, asked, 16)).tokens
            begin = time.monotonic()
            prompts = [body["prompt"] for body in asked]
            made = lm.sample(prompts, args.new, sampling=SamplingOptions(temperature=0.0))
            at_once = sum(len(sample.ids) for sample in made) / (time.monotonic() - begin)
            if turn:
                rates.append((served, at_once, served / at_once))
    served, at_once, rate = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"| {name} | {dtype} | {served:.1f} | {at_once:.1f} | {rate:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["gpt-neo-125m", "gpt2"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--offline", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = {name: make(Path(root) / name, name) for name in args.models}
        if args.offline:
            print("| model | dtype | served, tokens/s | one call | ratio |\n|---|---|---|---|---|")
        else:
            print(
                "| model | dtype | clients | tokens/s | transformers | ratio | first token, s | "
                "transformers | ratio |\n|---|---|---|---|---|---|---|---|---|"
            )
        for name, folder in folders.items():
            for dtype in args.dtypes:
                (offline if args.offline else compare)(folder, dtype, args, name)


if __name__ == "__main__":
    main()
