"""How long the host works between two steps of a server, while an accelerator would wait.

  python benchmarks/serving/host_time.py [--streams 1 4 16 32] [--tokens 300]

So many streams are written at one time. The time between the end of a step on the device and the
call of the next one is the host's: it takes the new tokens from the device, makes characters of
them, and sends these. The model is the bundled one on a CPU; what the host does depends on the
number of texts, not on the model.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import httpx
from servers import ours


def child(results: str, streams: int, args: Sequence[str]) -> None:
    """Is `neo-jax`, which notes the time between steps that write all streams."""
    import jax

    from neo_jax.cli import main
    from neo_jax.decode import engine

    run: Any = engine.run
    between, last = [0.0], 0.0

    def timed(model: Any, params: Any, state: Any, *rest: Any) -> Any:
        nonlocal last
        begun = time.perf_counter()
        if int((~state.done).sum()) == streams:
            between.append(begun - last)
        found = jax.block_until_ready(run(model, params, state, *rest))
        last = time.perf_counter()
        return found

    engine.run = timed
    status = main(args)
    with open(results, "w") as file:
        json.dump(between, file)
    sys.exit(status)


async def write(url: str, streams: int, tokens: int) -> None:
    """Reads so many streams at one time."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def read(seed: int) -> None:
            body = {"prompt": "The people", "max_tokens": tokens, "stream": True, "seed": seed}
            body["ignore_eos"] = True
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                async for _ in answer.aiter_lines():
                    pass

        await asyncio.gather(*(read(seed) for seed in range(streams)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--tokens", type=int, default=300)
    args = parser.parse_args()
    for streams in args.streams:
        with tempfile.NamedTemporaryFile("r") as results:
            program = (__file__, "--child", results.name, str(streams))
            with ours("--max-sequences", str(streams), program=program) as server:
                asyncio.run(write(server.url, streams, args.tokens))
            between = [1e3 * seconds for seconds in json.load(results)][1:]
        median, most = statistics.median(between), statistics.quantiles(between, n=100)[-1]
        words = f"{median:.1f} ms between steps (median), 99 % {most:.1f} ms"
        print(f"{streams} streams: {words}, of {len(between)} steps", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    main()
