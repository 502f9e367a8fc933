"""How long a command takes to start, beside JAX alone; prints ratios of wall time.

  python benchmarks/startup.py [--rounds 9]

Processes take turns; each figure is the median over rounds. Wants a quiet machine.

  import     `import neo_jax` over `import jax`; the bound is 1.5
  generate   32 tokens of the bundled model from a warm compilation cache, over a process that adds
             two numbers with JAX; the bound is 2.5
"""

import argparse
import statistics
import subprocess
import sys
import time

GENERATE = [
    "-m", "neo_jax", "generate", "The people of the United States", "--max-new-tokens", "32",
]  # fmt: skip
PAIRS = {
    "import": (["-c", "import neo_jax"], ["-c", "import jax"]),
    "generate": (GENERATE, ["-c", "import jax; jax.numpy.ones(1) + 1"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for name, pair in PAIRS.items():
        times = ([], [])
        for i in range(rounds + 1):
            for command, side in zip(pair, times, strict=True):
                start = time.perf_counter()
                subprocess.run([sys.executable, *command], check=True, capture_output=True)
                if i:  # the first fills caches
                    side.append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
        ours, theirs = (statistics.median(side) for side in times)
        print(f"{name:<10} {ratio:.2f} times: {ours:.2f} s over {theirs:.2f} s", flush=True)


if __name__ == "__main__":
    main()
