"""A global layer's attention where devices share a sequence: memory, waiting and evenness of work.

    python benchmarks/context_layer.py docs/context_layer.json [--topology v5e:2x4]
        [--lengths 8192 32768]

Attention of the heads of GPT-Neo 2.7B to one sequence over eight chips, forward and backward, as
the TPU's compiler compiles it; each length takes less than a minute. "temporaries" are bytes of a
device. "waits" counts gatherings and sums that the compiler lets nothing else run next to;
"seconds_waiting" is what they take by both links of an axis in a training step that computes
forward passes again, "seconds_computing" what the products of a global and a local layer take in
it at the chip's peak. "work" is the most blocks of logits that a device computes over the mean of
all, "work_in_order" what it would be if queries stayed with their keys. "ring" is what a ring would
hold instead: two shards of keys and values, and in the backward pass of their gradients in float32.
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.config import preset
from neo_jax.ops.attention import Mask, attend
from neo_jax.ops.attention.splash import causal_kernel
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.collectives import located
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.topology import find_topology

CHIPS = 8


def most_over_mean(indices, length):
    """Returns how much more a device has to do than the mean, its queries at these indices."""
    blocks = np.asarray(causal_kernel(indices, length, 1).fwd_mask_info.block_mask)
    counts = np.count_nonzero(blocks.reshape(len(indices), -1), axis=1)
    return round(float(counts.max() / counts.mean()), 4)


def measure(name, length):
    """Returns a row of results."""
    topology, config = find_topology(name), preset("gpt-neo-2.7b")
    sharding = make_sharding(f"context={CHIPS}", "length:context", topology.devices)
    axes, shape = (None, None, "length", None), (1, config.num_heads, length, config.head_dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.named(axes, shape, "queries"))

    def forward(q, k, v):
        positions = jnp.arange(length)[None]
        mask = Mask(positions, positions, aligned=True)
        return attend(q, k, v, mask, sharding=sharding).astype(jnp.bfloat16)

    def both(q, k, v, grad):
        return jax.vjp(forward, q, k, v)[1](grad)

    temporaries = {}
    for function, count in ((forward, 3), (both, 4)):
        lowered = jax.jit(function).trace(*[x] * count).lower()
        compiled = compile_for(lowered, topology)
        temporaries[function.__name__] = compiled.temporaries
    rows = located(parse(compiled.text), sharding.mesh.shape)
    waiting = [row for run, row in rows if not run.instruction.opcode.endswith("-start")]
    indices, half = np.arange(length).reshape(CHIPS, -1), length // CHIPS // 2
    dealt = np.concatenate([indices[:, :half], indices[::-1, half:]], axis=1)
    shard = 2 * 2 * 2 * length // CHIPS * config.embed_dim  # two of keys and values, bfloat16
    # Attention: 9 products of which a forward pass has 2; all others: 4 times a forward pass.
    flops = 4.5 * 2 * length**2 * config.embed_dim + 4 * 2 * 24 * length * config.embed_dim**2
    return {
        "topology": name,
        "length": length,
        "temporaries_forward": temporaries["forward"],
        "temporaries": temporaries["both"],
        "ring_forward": shard,
        "ring": 3 * shard,
        "sent": sum(row.wire_bytes for _, row in rows),
        "waits": len(waiting),
        "seconds_waiting": round(
            1.5 * sum(row.wire_bytes for row in waiting) / (2 * topology.chip.link_bandwidth), 5
        ),
        "seconds_computing": round(flops / CHIPS / topology.chip.peak_flops, 5),
        "work": most_over_mean(dealt, length),
        "work_in_order": most_over_mean(indices, length),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 32768])
    options = parser.parse_args()
    rows = [measure(options.topology, length) for length in options.lengths]
    options.results.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
