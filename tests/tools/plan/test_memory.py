"""What a plan says of memory, against what the process takes that runs the step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# The state is that of a step before: what the next one takes are the arrays that there are, and by
# how much the process grows.
RUN = """
import json, sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", sys.argv[4])  # the step is compiled once
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
from neo_jax.config import ModelConfig
from neo_jax.tools.plan.plan import make_plan
from neo_jax.tools.plan.steps import training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.config import TrainConfig
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import abstract_inputs, abstract_state, make_step
from anonymous_memory import peak_of, settled

config = TrainConfig(
    "", "", 10, 8, mesh=sys.argv[1], remat=sys.argv[2], dtype=sys.argv[3],
    model=ModelConfig(num_layers=2, embed_dim=1024, num_heads=8, vocab_size=8000, max_length=32,
                      attention_types=("global",)),
)
topology = find_topology("cpu:8")
planned = training_step(config, make_sharding(config.mesh, "", topology.devices))
plan = make_plan(planned, topology)
model = planned.model
optimizer = make_optimizer(config.optimizer, config.steps)
step = make_step(model, optimizer, config)
state, batch = jax.tree.map(
    lambda leaf: jax.device_put(np.ones(leaf.shape, leaf.dtype), leaf.sharding),
    (abstract_state(model, optimizer), abstract_inputs(config, model)[0]),
)
state, _ = jax.block_until_ready(step(state, batch))  # compiles
held = sum(shard.data.nbytes for leaf in jax.tree.leaves((state, batch))
           for shard in leaf.addressable_shards)
before = settled()
state, peak = peak_of(lambda: step(state, batch)[0])
print(json.dumps({"planned": 8 * plan.memory.total, "arguments": 8 * plan.memory.arguments,
                  "held": held, "taken": peak - before + held, "before": before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads RssAnon from /proc")
@pytest.mark.parametrize(
    ("mesh", "remat", "dtype"),
    [("fsdp=8", "none", "float32"), ("fsdp=4,model=2", "full", "bfloat16")],
)
def test_eight_cpu_devices_take_what_is_planned(mesh, remat, dtype, tmp_path):
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR", tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", RUN, mesh, remat, dtype, programs],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],  # where anonymous_memory is
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held"] == found["arguments"]
    assert found["taken"] == pytest.approx(found["planned"], rel=0.1)
