"""How long a command takes to start, beside JAX alone and transformers; prints ratios of wall time.

  python benchmarks/startup.py [--rounds 9] [--parts import generate warm fresh]

Processes take turns; each figure is the median over rounds. Wants a quiet machine.

  import     `import neo_jax` over `import jax`; the bound is 1.5
  generate   32 tokens of the bundled model from a warm compilation cache, over a process that adds
             two numbers with JAX; the bound is 2.5
  warm       from the start of a process to the first token of GPT-Neo 125M in shape, over a process
             that does the same with transformers; the bound is 0.75
  fresh      the same without a compilation cache; the bound is 1.0
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GENERATE = ["-m", "neo_jax", "generate"]
BUNDLED = [*GENERATE, "The people of the United States", "--max-new-tokens", "32"]
PROMPT = "w1 w2 w3 w4 w5 w6 w7 w8"
THEIRS = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer("{PROMPT}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", nargs="+", default=["import", "generate", "warm", "fresh"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        pairs = {
            "import": (["-c", "import neo_jax"], ["-c", "import jax"]),
            "generate": (BUNDLED, ["-c", "import jax; jax.numpy.ones(1) + 1"]),
        }
        if {"warm", "fresh"} & {*args.parts}:
            pairs |= dict.fromkeys(["warm", "fresh"], first_tokens(Path(root) / "model"))
        for name in args.parts:
            compare(name, pairs[name], Path(root), args.rounds)


def first_tokens(folder: Path) -> tuple[list[str], list[str]]:
    """Returns our command for the first token of a folder that it makes, and theirs."""
    sys.path.insert(0, str(Path(__file__).parent / "serving"))
    from models import make

    make(folder, "gpt-neo-125m")
    ours = [*GENERATE, PROMPT, "--model", str(folder), "--max-new-tokens", "1"]
    return [*ours, "--temperature", "0"], ["-c", THEIRS, str(folder)]


def compare(name: str, pair: tuple[list[str], list[str]], root: Path, rounds: int) -> None:
    """Prints a line: the first command's time over the second's."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        cache = root / (f"fresh_{i}" if name == "fresh" else "warm")
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for command, side in zip(pair, times, strict=True):
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *command], check=True, capture_output=True, env=environment
            )
            if i:  # the first fills caches
                side.append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    ours, theirs = (statistics.median(side) for side in times)
    print(f"{name:<10} {ratio:.2f} times: {ours:.2f} s over {theirs:.2f} s", flush=True)


if __name__ == "__main__":
    main()
