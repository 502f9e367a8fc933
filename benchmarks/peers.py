"""Generation on a CPU next to every engine that runs GPT-2 there; prints a table of ratios.

  python benchmarks/peers.py [--rounds 5] [--dtypes float32 bfloat16 int8] [--json FILE]

GPT-2 124M in shape, one set of drawn weights for all, greedy, prompts of ids; engines take turns in
one process, each in its own threads. What is not installed is left out and named:

  pip install transformers torch ctranslate2 onnxruntime openvino onnx llama-cpp-python gguf

  decode    64 new tokens after a prompt of 64, less the time of 1 new token after the same prompt
  prefill   the first new token after a prompt of 1,000

Ratios are medians over rounds of their time over ours: above 1 we are faster. Every engine's tokens
are compared with transformers' in float32. Wants a quiet machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from peers import engines

CASES = {  # batch, tokens of the prompt, new tokens
    "decode, batch 1": (1, 64, 64),
    "decode, batch 8": (8, 64, 64),
    "prefill 1000": (1, 1000, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "int8"])
    parser.add_argument("--engines", nargs="+", default=list(engines.ENGINES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(machine(), flush=True)
    found = {"machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        weights = engines.Weights.draw(Path(folder))
        for dtype in args.dtypes:
            sides = {}
            for name in ["neo_jax", *(each for each in args.engines if each != "neo_jax")]:
                with said_if_missing(name, dtype):
                    sides[name] = engines.ENGINES[name](weights, dtype)
            for case in args.cases:
                for row in rows(case, dtype, sides, args.rounds, weights):
                    found["rows"].append(row)
                    print(line(row), flush=True)
                if args.json:
                    args.json.write_text(json.dumps(found, indent=1) + "\n")


@contextlib.contextmanager
def said_if_missing(name: str, dtype: str):
    try:
        yield
    except (ImportError, engines.MissingError) as error:
        print(f"without {name} in {dtype}: {error}", flush=True)


def rows(case, dtype, sides, rounds, weights):
    """Times all engines in turns; yields a row for each."""
    batch, length, new = CASES[case]
    prompts = np.random.default_rng(0).integers(0, engines.VOCAB, (batch, length))
    times = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name in list(sides)[:: 1 if round_ % 2 else -1]:
            seconds = timed(sides[name], prompts, new)
            if new > 1:
                seconds -= timed(sides[name], prompts, 1)
            if round_:  # the first compiles and warms up
                times[name].append(seconds)
    tokens = batch * (new - 1 if new > 1 else length)
    expected = weights.greedy(prompts[:2, :64], 16)
    for name, seconds in times.items():
        got = np.array(sides[name](prompts[:2, :64], 16))
        ratios = [theirs / ours for ours, theirs in zip(times["neo_jax"], seconds, strict=True)]
        yield {
            "case": case,
            "dtype": dtype,
            "engine": name,
            "tokens_per_second": round(tokens / statistics.median(seconds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "same_tokens": round(float((got == expected).mean()), 3),
        }


def timed(side, prompts, new) -> float:
    start = time.perf_counter()
    side(prompts, new)
    return time.perf_counter() - start


def line(row) -> str:
    return (
        f"{row['case']:<16} {row['dtype']:<9} {row['engine']:<14} {row['tokens_per_second']:8.1f} "
        f"tokens/s, ours over theirs {row['ratio']:.2f}, {row['same_tokens']:.0%} of tokens alike"
    )


def machine() -> str:
    """Names the CPU, what of 16 and 8 bits it multiplies, and which path torch's MKL takes."""
    info = Path("/proc/cpuinfo").read_text()
    model = next(row for row in info.splitlines() if "model name" in row).partition(": ")[2]
    flags = next(row for row in info.splitlines() if row.startswith("flags")).split()
    fast = [flag for flag in ("avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    is_generic = "AuthenticAMD" in info and "MKL_DEBUG_CPU_TYPE" not in os.environ
    mkl = "; torch's MKL takes its generic path here" if is_generic else ""
    return f"{model}, {os.cpu_count()} cores, {' '.join(fast)}{mkl}"


if __name__ == "__main__":
    main()
