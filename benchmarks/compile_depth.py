"""How the time to compile a step of decoding for a TPU grows with the layers; prints a table.

  python benchmarks/compile_depth.py [--model gpt2] [--layers 12 48] [--batch 8] [--length 1024]

By the TPU's own compiler, without a TPU: seconds to trace and lower the step, and to compile it,
over those of the first number of layers. Wants a quiet machine.
"""

import argparse
import dataclasses
import time

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_compilation_cache", False)

import jax.numpy as jnp  # noqa: E402

from neo_jax.config import preset  # noqa: E402
from neo_jax.model.transformer import Neo  # noqa: E402
from neo_jax.sharding.rules import make_sharding  # noqa: E402
from neo_jax.tools.plan import steps  # noqa: E402
from neo_jax.tools.plan.topology import find_topology  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--topology", default="v5e:1x1")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    sharding = make_sharding("model=-1", devices=find_topology(args.topology).devices)
    print("| layers | trace and lower, s | compile, s | together | over the first |")
    print("|---|---|---|---|---|")
    first = 0.0
    for layers in [args.layers[0], *args.layers]:  # the first is once more: what warms up
        config = dataclasses.replace(preset(args.model), num_layers=layers)
        step = steps.decode_step(
            Neo(config, jnp.bfloat16, sharding=sharding), args.batch, args.length
        )
        jax.clear_caches()
        begin = time.perf_counter()
        lowered = step.trace().lower()
        middle = time.perf_counter()
        lowered.compile()
        end = time.perf_counter()
        total = end - begin
        if not first:
            first = -1.0
            continue
        first = total if first < 0 else first
        print(
            f"| {layers} | {middle - begin:.1f} | {end - middle:.1f} | {total:.1f} | "
            f"{total / first:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
