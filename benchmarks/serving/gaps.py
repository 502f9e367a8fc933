"""How long running streams wait while long prompts arrive.

  python benchmarks/serving/gaps.py [--streams 3] [--seconds 60] [--dtype float32]

Streams of GPT-Neo 125M's shape write without end; then prompts of 1,000 tokens arrive, one after
another. The gap between two tokens of a stream should be at most that of a step, as it is without
arrivals, and one chunk of a prompt.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from models import make
from servers import ours


async def stream(client: httpx.AsyncClient, gaps: list[float], until: list[float]) -> None:
    while time.monotonic() < until[0]:
        body = {"prompt": "w1 w2 w3", "max_tokens": 900, "stream": True, "temperature": 1.0}
        last = 0.0
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    now = time.monotonic()
                    if last:
                        gaps.append(now - last)
                    last = now
                    if now >= until[0]:
                        return


async def arrive(client: httpx.AsyncClient, until: list[float], seed: int) -> int:
    rng, count = np.random.default_rng(seed), 0
    while time.monotonic() < until[0]:
        prompt = rng.integers(0, 50257, 1000).tolist()
        answer = await client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 1})
        answer.raise_for_status()
        count += 1
    return count


async def measure(url: str, streams: int, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        found = {}
        for arrivals in (True, False, True):  # the first compiles
            gaps: list[float] = []
            until = [time.monotonic() + seconds]
            tasks = [stream(client, gaps, until) for _ in range(streams)]
            tasks += [arrive(client, until, 0)] if arrivals else []
            counts = await asyncio.gather(*tasks)
            found[arrivals] = np.array(gaps)
        alone, busy = found[False], found[True]
        step = float(np.median(alone))
        print(
            f"step alone: median {1e3 * step:.0f} ms, 99 % {1e3 * np.percentile(alone, 99):.0f} ms"
        )
        print(
            f"{counts[-1]} prompts of 1,000 tokens in {seconds:.0f} s; gaps: median "
            f"{1e3 * np.median(busy):.0f} ms, 99 % {1e3 * np.percentile(busy, 99):.0f} ms, "
            f"largest {1e3 * busy.max():.0f} ms"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folder = make(Path(root) / "model", "gpt-neo-125m")
        with ours("--model", str(folder), "--dtype", args.dtype) as server:
            asyncio.run(measure(server.url, args.streams, args.seconds))
            counts = server.metrics()
    read = counts["request_prefill_time_seconds_sum"] / counts["prompt_tokens_total"]
    print(f"a chunk of 256 tokens, with the step that follows it: {256e3 * read:.0f} ms")


if __name__ == "__main__":
    main()
