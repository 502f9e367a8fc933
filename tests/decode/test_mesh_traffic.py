"""What reading prompts and decoding move on meshes that split the batch: nothing of a cache."""

import jax
import jax.numpy as jnp
import pytest

from neo_jax.config import ModelConfig
from neo_jax.decode.prefill import next_chunk
from neo_jax.model.transformer import Neo
from neo_jax.serving.jobs import CHUNK
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.explanation import explain_text
from neo_jax.tools.plan.steps import decode_step, prefill_step, serve_step
from neo_jax.tools.plan.topology import find_topology

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("lines_of_this_checkout")]

ROWS = 8


def make_model(mesh, length, cache_dtype=None):
    """A global and a local layer, for texts of up to a length, and the topology."""
    topology = find_topology("v5e:2x4")
    config = ModelConfig(
        num_layers=2, embed_dim=256, num_heads=4, vocab_size=512, max_length=length, window_size=64
    )
    sharding = make_sharding(mesh, "decode", topology.devices)
    return Neo(config, jnp.bfloat16, sharding=sharding, cache_dtype=cache_dtype), topology


def moved(model, topology, traced):
    """What a device sends, as it is explained. A loop whose end depends on data runs once."""
    text = compile_for(traced.lower(), topology).text
    rows = explain_text(text, dict(model.sharding.mesh.shape)).moved
    return sorted(
        (row.wire_bytes, row.kind, row.axes, row.name, str(row.origin.line)) for row in rows
    )


def trace_decode(model, length):
    return decode_step(model, ROWS, length).trace()


def trace_serve(model, length):
    return serve_step(model, ROWS, length).trace()


def trace_prefill(model, length):
    """By pieces, so that a loop reads the same number of tokens whatever the length."""
    return prefill_step(model, ROWS, length).trace()


def trace_chunk(model, length):
    """A chunk of prompts that a server reads, on top of what it has read of them."""
    step = serve_step(model, ROWS, length)
    cache = step.beside["prompts being read"]
    rows = cache[0].positions.shape[0]
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, CHUNK), (rows,)))
    start, params = jax.ShapeDtypeStruct((), jnp.int32), step.parts["parameters"]
    return next_chunk.trace(model, params, tokens, start, lengths, cache)


@pytest.mark.parametrize(
    ("trace", "mesh", "cache_dtype"),
    [
        (trace_decode, "data=2,model=4", None),
        (trace_serve, "data=2,context=2,model=2", jnp.int8),
        (trace_prefill, "data=2,model=4", None),
        (trace_chunk, "data=2,model=4", None),
    ],
)
def test_what_is_moved_does_not_grow_with_the_cache(trace, mesh, cache_dtype):
    sent = []
    for length in (2048, 4096):
        model, topology = make_model(mesh, length, cache_dtype)
        sent.append(moved(model, topology, trace(model, length)))
    assert sent[0]  # sums of heads and of the MLP
    assert sent[0] == sent[1]


def test_a_prompt_enters_a_batch_without_what_the_batch_holds():
    """Its own keys and values go to where its row is, whatever the number of rows."""
    model, topology = make_model("data=2,model=4", 2048)
    sent = [
        moved(model, topology, serve_step(model, rows, 2048).trace_between()) for rows in (8, 16)
    ]
    assert sent[0] == sent[1]
    assert {name.partition(".")[0] for _, _, _, name, _ in sent[0]} <= {"cache[0]", "cache[1]"}
