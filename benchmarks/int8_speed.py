"""Decoding on a CPU with int8 weights beside float32 and bfloat16, taking turns; prints ratios.

  python benchmarks/int8_speed.py [--rounds 5] [--new 32] [--batches 1 8]

GPT-Neo 125M in shape, random weights; greedy; 32 new tokens after a prompt of 32, less the time of
one new token after the same prompt. Each figure is the median over rounds of float32's time over
that form's: above 1 it is faster than float32. Wants a quiet machine.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.config import preset
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.transformer import Neo, init_params
from neo_jax.transforms.quantize import quantize

PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    args = parser.parse_args()
    config = preset("gpt-neo-125m")
    params = jax.jit(functools.partial(init_params, Neo(config)))(jax.random.key(0))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    rounded = quantize(config, params, jnp.float32)
    forms = {
        "float32": (Neo(config), params),
        "bfloat16": (Neo(config, jnp.bfloat16), half),
        "int8": (Neo(config), rounded),
        "int8, its cache too": (Neo(config, cache_dtype=jnp.int8), rounded),
    }
    for batch in args.batches:
        prompts = np.random.default_rng(0).integers(0, 50257, (batch, PROMPT)).tolist()
        times: dict[str, list[float]] = {name: [] for name in forms}
        for round_ in range(args.rounds + 1):
            for name, (model, weights) in list(forms.items())[:: 1 if round_ % 2 else -1]:
                seconds = timed(model, weights, prompts, args.new)
                seconds -= timed(model, weights, prompts, 1)
                if round_:  # the first is for compiling and warming up
                    times[name].append(seconds)
        for name, mine in times.items():
            pairs = zip(times["float32"], mine, strict=True)
            ratio = statistics.median(theirs / ours for theirs, ours in pairs)
            speed = batch * (args.new - 1) / statistics.median(mine)
            print(f"batch {batch}  {name:<20} {ratio:.2f} times, {speed:.1f} tokens/s", flush=True)


def timed(model, params, prompts, new) -> float:
    settings = make_settings(SamplingOptions(temperature=0), [0] * len(prompts))
    start = time.perf_counter()
    engine.generate(model, params, prompts, new, settings)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
