"""Meshes ranked, with devices that are not here."""

import functools
import json

import pytest

from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan import report
from neo_jax.tools.plan.search import search
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

pytestmark = pytest.mark.tpu_compiler

MODEL = ModelConfig(num_layers=2, embed_dim=128, num_heads=2, vocab_size=500, max_length=128)


def build(topology, batch_size, mesh, rules):
    config = TrainConfig("", "", 1, batch_size, model=MODEL, remat="full")
    return training_step(config, make_sharding(mesh, rules, topology.devices))


def test_every_mesh_that_divides_is_ranked():
    topology = find_topology("v5e:2x2")
    found = search(functools.partial(build, topology, 4), topology, "train", 0)
    # Two heads do not divide over four devices.
    assert sorted(each.mesh for each in found) == [
        "data=1,fsdp=2,model=2", "data=1,fsdp=4,model=1", "data=2,fsdp=1,model=2",
        "data=2,fsdp=2,model=1", "data=4,fsdp=1,model=1",
    ]  # fmt: skip
    assert all(each.fits for each in found)
    times = [each.seconds for each in found]
    assert times == sorted(times)
    by_mesh = {each.mesh: each for each in found}
    whole, split = by_mesh["data=4,fsdp=1,model=1"], by_mesh["data=1,fsdp=4,model=1"]
    assert whole.memory > 2 * split.memory
    _, *table = report.ranking_lines(found)
    assert [line.split()[0] for line in table] == [each.mesh for each in found]
    assert json.dumps(report.describe_ranking(found))


def test_what_no_mesh_can_split_says_why():
    topology = find_topology("v5e:2x2")
    with pytest.raises(NeoError, match="does not divide over"):
        search(functools.partial(build, topology, 1), topology, "train", 0)
