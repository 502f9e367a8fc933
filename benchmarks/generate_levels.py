"""Whether many calls of generate hold on to memory or compile without end.

  python benchmarks/generate_levels.py [--model FOLDER] [--calls 100]

Lengths of prompts, new tokens, and options (greedy, drawn, penalized, with banned words) are drawn
at random. Prints programs compiled so far and the process's memory after every tenth of the calls,
and fails where the second half of the calls compiles more than a tenth of all programs or adds more
than 64 MB.
"""

import argparse
import random
import sys
from pathlib import Path

import jax

import neo_jax

MOST_BYTES = 64e6


def resident() -> int:
    """Bytes of memory that the process has (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="")
    parser.add_argument("--calls", type=int, default=100)
    args = parser.parse_args()
    programs = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: programs.append(event) if "backend_compile" in event else None
    )
    lm = neo_jax.load(args.model or None)
    rng = random.Random(0)
    context, vocab = lm.config.max_length, lm.config.vocab_size
    found = []
    for call in range(1, args.calls + 1):
        new = rng.randint(1, min(64, context // 2))
        prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, context - new))]
        words = [[rng.randrange(vocab) for _ in range(rng.randint(1, 4))] for _ in range(8)]
        options = rng.choice(
            [
                {"temperature": 0.0},
                {"temperature": 1.0, "top_k": rng.randint(0, 50), "seed": call},
                {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
                {"bad_words_ids": words, "suppress_tokens": [rng.randrange(vocab)]},
            ]
        )
        lm.generate([prompt], new, **options)
        found.append((len(programs), resident()))
        if call % max(args.calls // 10, 1) == 0:
            print(
                f"{call:>4} calls  {len(programs):>4} programs  {resident() / 1e6:8.1f} MB",
                flush=True,
            )
    (half, before), (whole, after) = found[len(found) // 2 - 1], found[-1]
    levels = whole - half <= whole / 10 and after - before <= MOST_BYTES
    print(
        f"second half: {whole - half} programs, {(after - before) / 1e6:+.1f} MB: "
        f"{'levels off' if levels else 'grows'}"
    )
    return 0 if levels else 1


if __name__ == "__main__":
    sys.exit(main())
