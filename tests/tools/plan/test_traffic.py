"""What a training step moves, as the true compiler compiles it: nothing that it need not."""

import collections
import dataclasses
import functools

import jax
import pytest

from neo_jax.config import ModelConfig
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.collectives import located, traffic
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

pytestmark = pytest.mark.tpu_compiler

MODEL = ModelConfig(
    num_layers=4, embed_dim=1024, num_heads=8, vocab_size=2048, max_length=128, window_size=64
)
RUN = TrainConfig("", "", 10, batch_size=16, model=MODEL, remat="full", dtype="bfloat16")


def moved(topology, mesh, rules):
    """Bytes that a device sends, by kind and mesh axes; the step, and the sizes of the mesh."""
    found = collections.Counter()
    topology = find_topology(topology)
    sharding = make_sharding(mesh, rules, topology.devices)
    step = training_step(dataclasses.replace(RUN, batch_size=sharding.mesh.size), sharding)
    text = compile_for(step.trace().lower(), topology).text
    for row in traffic(parse(text), dict(sharding.mesh.shape)):
        found[row.kind, "+".join(row.axes)] += row.wire_bytes
    return found, step, sharding.mesh.shape


@functools.cache
def num_parameters():
    step = training_step(RUN, make_sharding("data=1", "data", find_topology("v5e:1x1").devices))
    return sum(leaf.size for leaf in jax.tree.leaves(step.parts["parameters"]))


@pytest.mark.parametrize(
    ("topology", "mesh", "rules"),
    [
        ("v5e:4x4", "fsdp=16", "fsdp"),
        ("v5e:4x4", "fsdp=8,model=2", "fsdp+tensor"),
        ("v5p:2x2x2", "fsdp=8", "fsdp"),
    ],
)
def test_parameters_and_gradients_move_once(topology, mesh, rules):
    found, step, sizes = moved(topology, mesh, rules)
    shards, model = sizes["fsdp"], sizes.get("model", 1)
    of_device = num_parameters() / model * (shards - 1) / shards
    gathered, reduced = 2 * 2 * of_device, 4 * of_device  # bfloat16 twice, float32 once
    assert 0.9 * gathered < found["all-gather", "fsdp"] < 1.05 * gathered
    assert 0.9 * reduced < found["reduce-scatter", "fsdp"] < 1.05 * reduced
    # Of activations: two sums forward, one of them again, two backward; and the embedding's.
    activations = step.tokens // shards * MODEL.embed_dim * 4
    sums = 2 * (model - 1) / model * activations * (5 * MODEL.num_layers + 3)
    assert sum(found.values()) < 1.15 * (gathered + reduced + sums)


def test_a_local_layer_moves_its_window_whatever_the_length():
    """And a global one its keys and values, a fourteenth of that for even work, nothing else."""
    length = 4096
    topology = find_topology("v5e:2x4")
    sharding = make_sharding("context=8", "length:context", topology.devices)
    model = dataclasses.replace(MODEL, num_layers=2, embed_dim=256, num_heads=2, max_length=length)
    config = dataclasses.replace(RUN, batch_size=1, model=model)
    step = training_step(config, sharding)
    text = compile_for(step.trace().lower(), topology).text
    sent = collections.Counter()
    for run, row in located(parse(text), sharding.mesh.shape):
        is_of_attention = "bf16" in run.instruction.shape  # gradients are sums in float32
        sent[row.kind if is_of_attention else "gradients"] += row.wire_bytes
    keys = 4 * length * model.embed_dim * 7 / 8
    passes = 3  # forward, again, backward
    halo = 4 * (model.window_size - 1) * model.embed_dim
    assert sent["collective-permute"] <= passes * (1.01 * halo + keys / 14)
    assert sent["all-gather"] <= 2 * 1.01 * keys
    assert sent["reduce-scatter"] + sent["all-reduce"] <= 1.01 * keys
    weights = sum(leaf.size for leaf in jax.tree.leaves(step.parts["parameters"]))
    assert sent["gradients"] <= 1.2 * 2 * 4 * weights * 7 / 8
