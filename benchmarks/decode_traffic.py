"""What a step of decoding costs on TPUs, by the real compiler and without a TPU; prints a table.

  python benchmarks/decode_traffic.py [--batches 8 64] [--layers 0] [--json]

The released sizes in bfloat16, 2048 slots, on one v5e chip and on four with the heads split.

  temporaries   bytes the program needs beside weights and state, over the cache's: few per cent
  traffic       bytes a step moves over main memory, over those of the weights and the cache: near 1
  copies        instructions that copy keys or values as a whole: none
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
jax.config.update("jax_platforms", "cpu")

from decode_programs import compile_step  # noqa: E402

from neo_jax.config import preset  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["125m", "1.3b", "2.7b"])
    parser.add_argument("--topologies", nargs="+", default=["v5e:1x1", "v5e:2x2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--layers", type=int, default=0, help="0 is all that the model has")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    for name in args.models:
        config = preset(f"gpt-neo-{name}")
        config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
        for topology in args.topologies:
            for batch in args.batches:
                row = {"model": name, "topology": topology, "batch": batch}
                try:
                    step = compile_step(config, topology, batch)
                except jax.errors.JaxRuntimeError as error:
                    row["error"] = str(error).split(". ")[0]
                else:
                    row |= {
                        "weights_mb": step.weights / 1e6,
                        "cache_mb": step.cache / 1e6,
                        "temporaries": step.temporaries / step.cache,
                        "traffic": step.traffic / (step.weights + step.cache),
                        "copies": len(step.copies),
                    }
                rows.append(row)
                if not args.json:
                    print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                                    for k, v in row.items()), flush=True)  # fmt: skip
    if args.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
