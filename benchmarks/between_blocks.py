"""The strategy tensor with and without length:model, as the TPU's compiler compiles it.

    python benchmarks/between_blocks.py docs/between_blocks.json

A training step of GPT-Neo 2.7B's width at 2,048 tokens on v5e:2x2, model=4 (remat full, bfloat16),
with 2 layers and with 18. A run compiles one program of the four, in one to three minutes, and adds
a row to the file; run it four times. The temporaries of 16 layers more are what a device keeps of
activations between blocks.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from neo_jax.config import preset
from neo_jax.sharding.rules import STRATEGIES, make_sharding
from neo_jax.tools.plan.collectives import traffic
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

TENSOR = STRATEGIES["tensor"][1]


def measure(rules, layers):
    """Returns a row of results."""
    topology = find_topology("v5e:2x2")
    model = dataclasses.replace(preset("gpt-neo-2.7b"), num_layers=layers)
    config = TrainConfig("", "", 1, batch_size=1, model=model, remat="full", dtype="bfloat16")
    sharding = make_sharding("model=4", rules, topology.devices)
    compiled = compile_for(training_step(config, sharding).trace().lower(), topology)
    sent = sum(row.wire_bytes for row in traffic(parse(compiled.text), sharding.mesh.shape))
    temporaries = compiled.temporaries
    return {"rules": rules, "layers": layers, "sent": sent, "temporaries": temporaries}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.results.read_text()) if options.results.exists() else []
    for layers in (2, 18):
        for rules in (TENSOR, f"length:model,{TENSOR}"):
            if not any((row["rules"], row["layers"]) == (rules, layers) for row in rows):
                rows.append(measure(rules, layers))
                options.results.write_text(json.dumps(rows, indent=1) + "\n")
                print(rows[-1])
                return


if __name__ == "__main__":
    main()
