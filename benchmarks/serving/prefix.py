"""Seconds to the first token of prompts that begin alike, with the cache of prefixes and without.

  python benchmarks/serving/prefix.py [--model NAME] [--tokens 1500] [--rounds 5]

Two servers, which take turns: one keeps what prompts begin with, the other nothing. Every prompt is
a beginning of so many tokens that all share, and a few words of its own; one is sent before. Prints
the medians and their ratio. Without --model: GPT-Neo 125M in shape, drawn weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import httpx
from models import make
from servers import Server, ours


def first_token(server: Server, prompt: list[int]) -> float:
    """Seconds from a request to the first event of its stream."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    begin = time.monotonic()
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith("data: {"))
        seconds = time.monotonic() - begin
        for _ in lines:
            pass
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    shared = [(7 * i) % 4000 + 300 for i in range(args.tokens)]
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(make(Path(folder) / "model", "gpt-neo-125m"))
        options = ("--model", model, "--max-sequences", "4")
        with ours(*options) as keeps, ours(*options, "--prefix-cache", "0") as reads:
            found: dict[str, list[float]] = {"with": [], "without": []}
            for turn in range(args.rounds + 2):
                for name, server in (("with", keeps), ("without", reads)):
                    found[name].append(first_token(server, [*shared, 300 + turn, 301]))
            hits = keeps.metrics()["prefix_cache_hits_total"]
    # The first prompt fills the cache, the second compiles what a hit takes.
    medians = {name: statistics.median(seconds[2:]) for name, seconds in found.items()}
    ratio = medians["with"] / medians["without"]
    print(json.dumps({**medians, "ratio": ratio, "tokens_found": hits, "rounds": args.rounds}))


if __name__ == "__main__":
    main()
