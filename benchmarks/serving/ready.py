"""From the command to the first answer: `neo-jax serve` until /health says so, next to `generate`.

  python benchmarks/serving/ready.py [--rounds 3]

GPT-Neo 125M's shape with a warm compilation cache; the two take turns.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from models import make
from servers import ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ready, first = [], []
    with tempfile.TemporaryDirectory() as root:
        folder = str(make(Path(root) / "model", "gpt-neo-125m"))
        command = [sys.executable, "-m", "neo_jax", "generate", "w1 w2 w3", "--model", folder]
        for turn in range(args.rounds + 1):  # the first one compiles
            begin = time.monotonic()
            subprocess.run([*command, "--max-new-tokens", "1"], check=True, capture_output=True)
            generated = time.monotonic() - begin
            with ours("--model", folder) as server:
                pass
            if turn:
                first.append(generated)
                ready.append(server.seconds)
    one, other = statistics.median(ready), statistics.median(first)
    print(f"ready after {one:.1f} s, generate's first token {other:.1f} s: {one / other:.2f}")


if __name__ == "__main__":
    main()
