"""What devices that share a sequence exchange for attention, as the TPU's compiler compiles it.

    python benchmarks/context_traffic.py docs/context_traffic.json [--topologies v5e:2x4 v5p:2x2x2]
        [--lengths 2048 8192 32768]

A training step of one global and one local layer of GPT-Neo 2.7B, a sequence over eight chips
(length:context, remat full, bfloat16). Every device has all weights here, so that what moves is
attention's, in bfloat16, and the sums of gradients, in float32. Compiling takes a minute or three
each; results are added to the file as they come, and a row that it has is left out.

Bytes are those that a device sends. The halo is that of one pass; the rest of the step: forward,
again for the backward pass, and backward. "share" is what attention sends over what gathering all
keys and values in both layers would, 3 passes of 2 layers of 4 T width (C - 1) / C bytes. All that
is not attention's is compared with the sums of gradients, 2 x 4 bytes a weight.
"""

import argparse
import collections
import dataclasses
import json
import re
from pathlib import Path

import jax

from neo_jax.config import preset
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.collectives import located
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

CHIPS = 8


def measure(name, length):
    """Returns a row of results."""
    topology = find_topology(name)
    model = dataclasses.replace(preset("gpt-neo-2.7b"), num_layers=2, max_length=length)
    config = TrainConfig("", "", 1, batch_size=1, model=model, remat="full", dtype="bfloat16")
    sharding = make_sharding(f"context={CHIPS}", "length:context", topology.devices)
    step = training_step(config, sharding)
    weights = sum(leaf.size for leaf in jax.tree.leaves(step.parts["parameters"]))
    compiled = compile_for(step.trace().lower(), topology)
    sent = collections.Counter()
    halo = model.window_size - 1
    for run, row in located(parse(compiled.text), sharding.mesh.shape):
        shape = run.instruction.shape
        sizes = set(re.search(r"\[([\d,]*)\]", shape)[1].split(","))
        if "bf16" not in shape:
            what = "rest"
        elif row.kind == "collective-permute":
            what = "halo" if str(halo) in sizes else "queries"
        else:
            what = "keys and values"
        sent[what] += row.wire_bytes
    attention = sent["halo"] + sent["queries"] + sent["keys and values"]
    gathered = 4 * length * model.embed_dim * (CHIPS - 1) // CHIPS
    return {
        "topology": name,
        "length": length,
        "halo_of_a_pass": sent["halo"] // 3,
        "halo_over_its_bytes": round(sent["halo"] / 3 / (4 * halo * model.embed_dim), 4),
        "halo": sent["halo"],
        "queries": sent["queries"],
        "keys_and_values": sent["keys and values"],
        "rest_over_gradients": round(sent["rest"] / (2 * 4 * weights * (CHIPS - 1) / CHIPS), 4),
        "share": round(attention / (6 * gathered), 4),
        "temporaries": compiled.temporaries,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5p:2x2x2"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    options = parser.parse_args()
    rows = json.loads(options.results.read_text()) if options.results.exists() else []
    for topology in options.topologies:
        for length in options.lengths:
            if not any((row["topology"], row["length"]) == (topology, length) for row in rows):
                rows.append(measure(topology, length))
                rows.sort(key=lambda row: (row["topology"], row["length"]))
                options.results.write_text(json.dumps(rows, indent=1) + "\n")
                print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main()
