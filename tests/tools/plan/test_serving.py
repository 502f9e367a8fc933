"""What a plan says of a server, against what the process takes that runs its scheduler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.serving import plan_server
from neo_jax.tools.plan.steps import serve_step
from neo_jax.tools.plan.topology import find_topology

TESTS = Path(__file__).parents[2]  # where anonymous_memory is

# The scheduler twice: the first compiles. Its batch grows in rows and in length, then it writes.
RUN = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp
from neo_jax.config import ModelConfig
from neo_jax.decode.options import Room, SamplingOptions
from neo_jax.decode.requests import Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.model.declared import logical_axes
from neo_jax.model.transformer import Neo, init_params
from neo_jax.serving.jobs import CHUNK
from neo_jax.serving.protocol import MOST_BIASES
from neo_jax.sharding.rules import make_sharding, tree_shardings
from neo_jax.tools.plan.serving import served
from neo_jax.tools.plan.steps import serve_step
from neo_jax.tools.plan.topology import find_topology
from anonymous_memory import peak_of, settled

ROWS = 64
topology = find_topology("cpu:8")
sharding = make_sharding("data=4,model=2", "batch:data,heads:model,mlp:model", topology.devices)
model = Neo(ModelConfig(num_layers=2, embed_dim=256, num_heads=4, vocab_size=2000, max_length=1024,
                        attention_types=("global",), eos_token_id=-1), sharding=sharding)
init = lambda key: init_params(model, key)
shapes = jax.eval_shape(init, jax.random.key(0))
places = tree_shardings(sharding, logical_axes(model), shapes)
params = jax.block_until_ready(jax.jit(init, out_shardings=places)(jax.random.key(0)))
room = Room(biases=MOST_BIASES, alternatives=20)

def work():
    scheduler = Scheduler(model, params, ROWS, room, CHUNK)
    options = [SamplingOptions(ignore_eos=True)] * ROWS
    scheduler.submit(Request([1] * 300, 200, options, stream=True))  # as many as there are rows
    for _ in range(5):
        scheduler.step()
    scheduler.cancel(1)
    scheduler.submit(Request([1] * 300, 700, options[:-1], stream=True))
    scheduler.submit(Request([1] * 300, 700, options[:1], stream=True))
    for _ in range(5):
        scheduler.step()
    assert scheduler._state.tokens.shape == (ROWS, 1024)

work()
before = settled()
_, peak = peak_of(work)
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params)
           for shard in leaf.addressable_shards)
plan = served(serve_step(model, ROWS, 1024), topology, 0)
print(json.dumps({"planned": 8 * plan.memory, "taken": peak - before + held, "before": before,
                  "step": 8 * plan.plan.memory.total}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from /proc")
def test_eight_cpu_devices_take_what_is_planned():
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=TESTS,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["taken"] == pytest.approx(found["planned"], rel=0.1), found


def test_as_many_as_fit(monkeypatch):
    """On devices of little memory: the last fits, and one unit more does not."""
    topology = find_topology("cpu:4")
    sharding = make_sharding("data=2,model=2", "decode", topology.devices[:4])
    config = ModelConfig(num_layers=2, embed_dim=32, num_heads=2, vocab_size=64, max_length=64)
    model = Neo(config, sharding=sharding)
    room = 3_000_000
    for module in ("serving", "plan"):
        monkeypatch.setattr(f"neo_jax.tools.plan.{module}.capacity", lambda topology: room)
    servers = plan_server(lambda rows: serve_step(model, rows, 64), topology, 10_000)
    most = servers[-1].rows
    assert [each.rows for each in servers[:2]] == [2, 16]
    assert most % 2 == 0
    assert 0.9 * room < servers[-1].memory <= room
    monkeypatch.setattr("neo_jax.tools.plan.serving.capacity", lambda topology: 1000)
    monkeypatch.setattr("neo_jax.tools.plan.plan.capacity", lambda topology: 1000)
    with pytest.raises(NeoError, match="not even one sequence fits"):
        plan_server(lambda rows: serve_step(model, rows, 64), topology, 10_000)
