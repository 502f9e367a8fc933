"""The step of decoding, compiled for TPUs that are not there, and what there is to say of it."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hlo import Program

from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model import cache as caching
from neo_jax.model.transformer import Neo, init_params, logical_axes
from neo_jax.ops.tuning import tpu_layout
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.topology import find_topology


class Step(NamedTuple):
    """A compiled step; bytes are of one device."""

    weights: float  # bytes of parameters that a step needs: all but the learned positions
    cache: float  # bytes of the cache
    temporaries: float  # bytes that the program needs beside what it is given
    traffic: float  # bytes that one step reads from and writes to main memory
    copies: list[str]  # instructions that copy a leaf of the cache, or lay it out anew


def compile_step(config: ModelConfig, topology: str, batch: int, room: int = 2048) -> Step:
    """Compiles `engine.run` in bfloat16, heads over the devices of a topology.

    Raises:
      jax.errors.JaxRuntimeError: the devices are too small.
    """
    devices = find_topology(topology).devices
    sharding = make_sharding(f"model={len(devices)}", "tensor", devices=devices)
    model = Neo(config, jnp.bfloat16, sharding=sharding)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    params = jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.bfloat16,
            sharding=tpu_layout(sharding.named(axes, leaf.shape), axes),
        ),
        shapes,
        logical_axes(model),
    )
    state = _state(model, shapes, batch, room)
    compiled = engine.run.on(model).lower(model, params, state, 1).compile()
    leaves = jax.tree.leaves(state.cache)
    text = compiled.as_text()
    program = Program(text, trips=batch)
    return Step(
        weights=sum(_bytes(leaf) for leaf in jax.tree.leaves(params | {"wpe": None})),
        cache=sum(map(_bytes, leaves)),
        temporaries=compiled.memory_analysis().temp_size_in_bytes,
        traffic=max(map(program.traffic, program.loops())),
        copies=_copies(text, {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}),
    )


def _state(model: Neo, params: dict, batch: int, room: int) -> engine.DecodeState:
    """A decoding state as it lies on the mesh."""
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * batch)
    prompts = jax.ShapeDtypeStruct((batch, room // 2), jnp.int32)
    prefill = functools.partial(engine.prefill, model, room)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    state = jax.eval_shape(prefill, params, prompts, rows, rows, settings)

    def put(leaf: jax.ShapeDtypeStruct, axes: tuple) -> jax.ShapeDtypeStruct:
        place = model.sharding.named(axes, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    placed = jax.tree.map(
        lambda leaf: put(leaf, ("batch", *[None] * (leaf.ndim - 1))), state._replace(cache=())
    )
    cache = [
        caching.LayerCache(*(put(leaf, caching.LOGICAL_AXES[n]) for n, leaf in layer.items()))
        for layer in (layer._asdict() for layer in state.cache)
    ]
    return placed._replace(cache=tuple(cache))


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _copies(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Instructions whose result has the shape of keys or values; moves to the fast memory not."""
    large = {",".join(map(str, shape)) for shape in shapes if len(shape) == 4}
    found = re.findall(r"%([\w.\-]+) = \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return [name for name, shape in found if shape in large]
