"""How a chunk of a prompt is written into a TPU's cache, by the real compiler; prints a table.

  python benchmarks/chunk_traffic.py [--models 125m 1.3b 2.7b] [--topologies v5e:1x1 v5e:2x2]

256 tokens on top of a cache of 2048 slots, in bfloat16: written one by one, as drafts are, and as
two slices a row and layer, as `neo_jax.ops.cache_write` chooses for so many.

  writes        slices that are written one after another
  temporaries   bytes the program needs beside weights and cache, in MB
  traffic       bytes it moves over main memory, in MB
  copies        instructions that copy keys or values as a whole
"""

import argparse
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
jax.config.update("jax_platforms", "cpu")

from decode_programs import compile_chunk  # noqa: E402

from neo_jax.config import preset  # noqa: E402
from neo_jax.ops import cache_write  # noqa: E402

CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["125m", "1.3b", "2.7b"])
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "v5e:2x2"])
    args = parser.parse_args()
    print("| model | topology | written | writes | temporaries | traffic | copies |")
    print("|---|---|---|---|---|---|---|")
    for name in args.models:
        config = preset(f"gpt-neo-{name}")
        for topology in args.topologies:
            for way, few, trips in (("one by one", CHUNK, CHUNK), ("as slices", 17, 2)):
                cache_write.FEW = few
                made = compile_chunk(config, topology, trips, CHUNK)
                writes = trips * config.num_layers
                print(
                    f"| {name} | {topology} | {way} | {writes} | {made.temporaries / 1e6:.1f} | "
                    f"{made.traffic / 1e6:.0f} | {len(made.copies)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
