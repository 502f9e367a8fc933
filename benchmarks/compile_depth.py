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
    print("| layers | trace and lower, s | compile, s | together | over the first |")
    print("|---|---|---|---|---|")
    seconds(args, args.layers[0])  # the first warms up
    rows = {layers: seconds(args, layers) for layers in args.layers}
    for layers, (trace, compilation) in rows.items():
        total = trace + compilation
        ratio = total / sum(rows[args.layers[0]])
        print(f"| {layers} | {trace:.1f} | {compilation:.1f} | {total:.1f} | {ratio:.2f} |")


def seconds(args: argparse.Namespace, layers: int) -> tuple[float, float]:
    """Returns how long a step of so many layers takes to trace and lower, and to compile."""
    config = dataclasses.replace(preset(args.model), num_layers=layers)
    sharding = make_sharding("model=-1", devices=find_topology(args.topology).devices)
    model = Neo(config, jnp.bfloat16, sharding=sharding)
    step = steps.decode_step(model, args.batch, args.length)
    jax.clear_caches()
    begin = time.perf_counter()
    lowered = step.trace().lower()
    middle = time.perf_counter()
    lowered.compile()
    return middle - begin, time.perf_counter() - middle


if __name__ == "__main__":
    main()
