"""The TPU kernel as the real compiler takes it, in training and in prefill, on meshes."""

import collections
import re

import jax
import jax.numpy as jnp
import pytest

from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.scan import abstract_params
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding, tree_shardings
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.objectives.next_token import Batch, NextToken

pytestmark = pytest.mark.tpu_compiler

BATCH = 8


def model_on(topology, mesh, rules, **sizes):
    config = ModelConfig(num_layers=2, embed_dim=256, vocab_size=512, eos_token_id=-1, **sizes)
    sharding = make_sharding(mesh, rules, devices=find_topology(topology).devices)
    return Neo(config, jnp.bfloat16, sharding=sharding)


def placed(model, shapes, axes, dtype):
    """Shapes with the places that a strategy gives them."""
    places = tree_shardings(model.sharding, axes, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place), shapes, places
    )


def rows(model, width, dtype):
    place = model.sharding.named(("batch", None), (BATCH, width))
    return jax.ShapeDtypeStruct((BATCH, width), dtype, sharding=place)


def lower_gradient(model, length, with_segment_starts=False, remat="none"):
    segment_starts = rows(model, length, jnp.int32) if with_segment_starts else None
    batch = Batch(
        rows(model, length + 1, jnp.int32), rows(model, length, jnp.float32), segment_starts
    )
    gradient = jax.grad(lambda p, b: NextToken().loss(model, p, b, remat=remat).objective)
    return jax.jit(gradient).lower(abstract_params(model), batch)


def kernels(lowered, topology):
    """How often a program calls each kernel, and the shapes that they give of its outputs."""
    program = compile_for(lowered, find_topology(topology)).text
    calls = re.findall(r"%splash_mha_(fwd|dq|dkv)\S* = (.*?) custom-call\(", program)
    counts = collections.Counter(name for name, _ in calls)
    return counts, {shape for _, types in calls for shape in re.findall(r"bf16\[([\d,]+)\]", types)}


@pytest.mark.parametrize(
    ("mesh", "rules", "sizes", "length", "options", "forward", "shape"),
    [
        ("fsdp=2,model=2", "fsdp+tensor", {"num_heads": 4}, 96, {"remat": "full"}, 4, "4,2,128,64"),
        ("data=4", "data", {"num_heads": 2}, 600, {"with_segment_starts": True}, 2, "2,2,640,128"),
        ("model=4", "tensor", {"num_heads": 64}, 1024, {}, 2, "8,16,1024,4"),
    ],
)  # fmt: skip
def test_a_training_step_on_a_mesh(mesh, rules, sizes, length, options, forward, shape):
    """Every device works on its own rows and heads; any length, any width of head."""
    model = model_on("v5e:2x2", mesh, rules, **sizes)
    counts, shapes = kernels(lower_gradient(model, length, **options), "v5e:2x2")
    assert counts == {"fwd": forward, "dq": 2, "dkv": 2}
    assert shapes == {shape}


def test_prefill():
    model = model_on("v5e:1x1", "model=1", "decode", num_heads=2)
    shapes = param_shapes(model)
    params = placed(model, shapes, logical_axes(model), jnp.bfloat16)
    settings = make_settings(SamplingOptions(), [0] * BATCH)
    lengths = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    tokens = rows(model, 256, jnp.int32)
    lowered = engine.prefill.lower(model, 512, params, tokens, lengths, lengths, settings)
    counts, shapes = kernels(lowered, "v5e:1x1")
    assert counts == {"fwd": 1}  # what the last layer attends to goes to the cache, and no further
    assert shapes == {f"{BATCH},2,256,128"}
