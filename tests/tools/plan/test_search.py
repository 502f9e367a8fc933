"""Ways to run a step ranked, with devices that are not here."""

import dataclasses
import itertools
import json
import math

import pytest

from neo_jax.config import ModelConfig, preset
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan import ranking, search
from neo_jax.tools.plan.estimate import Choice, choices, estimated_memory
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import TrainConfig

pytestmark = pytest.mark.tpu_compiler

MODEL = ModelConfig(num_layers=2, embed_dim=128, num_heads=2, vocab_size=500, max_length=128)


@pytest.fixture(scope="module")
def topology():
    return find_topology("v5e:2x2")


def ranked(topology, batch_size=4, number=0, limit=0.0, model=MODEL):
    config = TrainConfig("", "", 1, batch_size, model=model, dtype="bfloat16")

    def build(choice):
        sharding = make_sharding(choice.mesh, choice.rules, topology.devices)
        return training_step(choice.applied(config), sharding)

    return search.search_training(config, build, topology, number, limit)


def test_every_way_that_divides_is_ranked(topology):
    found = ranked(topology)
    meshes = {each.mesh for each in found}
    # Two heads do not divide over four devices.
    assert meshes == {
        "data=1,fsdp=2,model=2", "data=1,fsdp=4,model=1", "data=2,fsdp=1,model=2",
        "data=2,fsdp=2,model=1", "data=4,fsdp=1,model=1", "data=1,fsdp=1,model=1,context=4",
        "data=1,fsdp=1,model=2,context=2", "data=1,fsdp=2,model=1,context=2",
        "data=2,fsdp=1,model=1,context=2",
    }  # fmt: skip
    assert {each.choice.remat for each in found} == {"none", "products", "full"}
    assert {each.choice.accumulation for each in found} == {1, 2, 4}
    assert {each.choice.kernel for each in found} == set(search.KERNELS)
    assert all(each.fits for each in found)
    times = [each.seconds for each in found]
    assert times == sorted(times)
    assert json.dumps(ranking.describe_ranking(found))
    *_, told, options = ranking.ranking_lines(found)
    assert f"{len(found):,} ways considered. data=" in told
    assert found[0].choice.mesh in options


def test_what_the_arithmetic_lets_through_can_be_built(topology):
    config = TrainConfig("", "", 1, 8, model=MODEL, dtype="bfloat16")
    for choice in choices(config, 4):
        if choice.remat == "full":
            sharding = make_sharding(choice.mesh, choice.rules, topology.devices)
            training_step(choice.applied(config), sharding)


def test_a_limit_of_memory(topology):
    model = dataclasses.replace(preset("gpt-neo-1.3b"), num_layers=2)
    free = ranked(topology, 16, model=model)
    half = free[0].memory / 2
    tight = ranked(topology, 16, limit=half, model=model)
    assert tight[0].memory <= half < free[0].memory
    assert tight[0].seconds > free[0].seconds
    assert "would be faster, but needs" in ranking.why(tight)
    front = search.pareto(tight)
    for one, other in itertools.pairwise(front):
        assert one.seconds < other.seconds
        assert one.memory > other.memory
    assert not any(
        each.seconds < some.seconds and each.memory < some.memory for each in free for some in front
    )


def test_the_compiler_has_the_last_word(topology):
    found = ranked(topology, number=1)
    made = [each for each in found if each.plan]
    assert found[0] in made
    assert found[0].best.memory == found[0].plan.memory.total
    assert found[0].best.seconds == found[0].plan.prediction.step
    assert "compiled" in list(ranking.ranking_lines(found))[1]


def test_arithmetic_of_one_mesh(topology):
    config = TrainConfig("", "", 1, 4, model=MODEL)
    one = search.estimated(config, make_sharding("fsdp=4", "", topology.devices), topology)
    assert one.choice == Choice(fsdp=4, remat="none")
    assert math.isfinite(one.seconds)
    assert one.memory == estimated_memory(config, one.choice)
    _, line, *parts = ranking.ranking_lines([one])
    assert "by arithmetic" in line
    assert [part.split()[0] for part in parts] == list(one.times.parts)
    odd = make_sharding("fsdp=2,model=2", "mlp:model", topology.devices)
    with pytest.raises(NeoError, match="arithmetic knows the rules of fsdp"):
        search.estimated(config, odd, topology)


def test_what_no_mesh_can_split_says_why(topology):
    with pytest.raises(NeoError, match="no mesh of 4 devices splits the step"):
        ranked(topology, 1, model=dataclasses.replace(MODEL, max_length=127))
