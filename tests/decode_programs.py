"""The step of decoding, compiled for TPUs that are not there, and what there is to say of it."""

import functools
import gzip
import json
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hlo import Program

from neo_jax.config import ModelConfig
from neo_jax.decode import engine, prefill
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.devices.compilation_cache import kept_plans
from neo_jax.files.paths import write_whole
from neo_jax.model import cache as caching
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import tpu_layout
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan import compilation
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
    model, params = _on(topology, config)
    state = _state(model, params, batch, room)
    compiled = _compiled(engine.run.on(model).lower(model, params, state, 1), topology)
    program = Program(compiled.text, trips=batch)
    traffic = max(map(program.traffic, program.loops()))
    return _step(params, state.cache, compiled, traffic)


def compile_chunk(
    config: ModelConfig, topology: str, trips: int = 2, chunk: int = 256, room: int = 2048
) -> Step:
    """Compiles `prefill.next_chunk` of one prompt in bfloat16, as `compile_step` does.

    A loop that writes it runs `trips` times, two for two slices.
    """
    model, params = _on(topology, config)
    state = _state(model, params, 1, room)
    tokens = jax.ShapeDtypeStruct((1, chunk), jnp.int32)
    number, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((), (1,)))
    first = functools.partial(prefill.first_chunk, model)
    cache = jax.eval_shape(lambda *args: first(*args, room)[1], params, tokens, lengths)
    cache = _placed_cache(model, cache)
    # A function of its own: one that is traced anew, with the ways of writing as they are now.
    next_chunk = jax.jit(prefill.next_chunk.__wrapped__, static_argnums=0, donate_argnums=5)
    lowered = next_chunk.lower(model, params, tokens, number, lengths, cache)
    compiled = _compiled(lowered, topology)
    program = Program(compiled.text, trips)
    assert state.cache[0].k.shape[2] == cache[0].k.shape[2] == room
    return _step(params, cache, compiled, program.traffic(list(program.computations)[-1]))


def _on(topology: str, config: ModelConfig) -> tuple[Neo, dict]:
    """A model with its heads over the devices of a topology, and its parameters there."""
    devices = find_topology(topology).devices
    sharding = make_sharding(f"model={len(devices)}", "tensor", devices=devices)
    model = Neo(config, jnp.bfloat16, sharding=sharding)
    shapes = param_shapes(model)
    return model, jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(
            leaf.shape,
            jnp.bfloat16,
            sharding=tpu_layout(sharding.named(axes, leaf.shape), axes),
        ),
        shapes,
        logical_axes(model),
    )


class _Compiled(NamedTuple):
    text: str
    temporaries: int


def _compiled(lowered: jax.stages.Lowered, topology: str) -> _Compiled:
    """Compiles a program, or finds what came out of it before; kept next to plans, as these are."""
    folder = kept_plans()
    name = compilation._key(lowered, find_topology(topology))
    kept = folder / f"{name}.decode.json.gz" if folder else None
    if kept and kept.exists():
        return _Compiled(*json.loads(gzip.decompress(kept.read_bytes())))
    compiled = lowered.compile()
    found = _Compiled(compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes)
    if kept:
        write_whole(kept, gzip.compress(json.dumps(found).encode()))
    return found


def _step(params: dict, cache: caching.Cache, compiled: _Compiled, traffic: float) -> Step:
    leaves = jax.tree.leaves(cache)
    return Step(
        weights=sum(_bytes(leaf) for leaf in jax.tree.leaves(params | {"wpe": None})),
        cache=sum(map(_bytes, leaves)),
        temporaries=compiled.temporaries,
        traffic=traffic,
        copies=_copies(compiled.text, {leaf.sharding.shard_shape(leaf.shape) for leaf in leaves}),
    )


def _state(model: Neo, params: dict, batch: int, room: int) -> engine.DecodeState:
    """A decoding state as it lies on the mesh."""
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * batch)
    prompts = jax.ShapeDtypeStruct((batch, room // 2), jnp.int32)
    prefill = functools.partial(engine.prefill, model, room)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    state = jax.eval_shape(prefill, params, prompts, rows, rows, settings)
    placed = jax.tree.map(
        lambda leaf: _put(model, leaf, ("batch", *[None] * (leaf.ndim - 1))),
        state._replace(cache=()),
    )
    return placed._replace(cache=_placed_cache(model, state.cache))


def _placed_cache(model: Neo, cache: caching.Cache) -> caching.Cache:
    axes = caching.LOGICAL_AXES
    return tuple(
        caching.LayerCache(*(_put(model, leaf, axes[n]) for n, leaf in layer._asdict().items()))
        for layer in cache
    )


def _put(model: Neo, leaf: jax.ShapeDtypeStruct, axes: tuple) -> jax.ShapeDtypeStruct:
    place = model.sharding.named(axes, leaf.shape)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _bytes(leaf: jax.ShapeDtypeStruct) -> float:
    return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def _copies(text: str, shapes: set[tuple[int, ...]]) -> list[str]:
    """Instructions whose result has the shape of keys or values; moves to the fast memory not."""
    large = {",".join(map(str, shape)) for shape in shapes if len(shape) == 4}
    found = re.findall(r"%([\w.\-]+) = \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return [name for name, shape in found if shape in large]
