"""What the compiled decoding loop does to the cache: on a CPU, and on TPUs by their compiler."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from decode_programs import compile_chunk, compile_step
from hlo import Program
from jax.experimental.layout import Format, Layout

from neo_jax.config import preset
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.ops import cache_write
from neo_jax.ops.tuning import tpu_layout
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler


@pytest.mark.parametrize("batch", [1, 3])
def test_no_step_copies_a_cache(tiny, batch):
    """On a CPU, in float32."""
    model, params = tiny
    settings = make_settings(SamplingOptions(), [0] * batch)
    state = engine.start(model, params, [[1, 2, 3]] * batch, 40, settings)
    program = engine.run.on(model).lower(model, params, state, 1).compile().as_text()
    copied = re.findall(r"= (\S+?)\{\S* copy\(", program)
    sizes = {"x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(state.cache)}
    sizes |= {size.partition("x")[2] for size in sizes}  # without the batch axis
    assert len(sizes) == 8  # keys or values, and positions, of a global and of a local layer
    large = {size for size in sizes if size.count("x") >= 2}
    assert not large & {re.sub(r"^\w+\[|\]$", "", shape).replace(",", "x") for shape in copied}


@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float32, "f32")])
@pytest.mark.parametrize("batch", [1, 3])
def test_on_a_cpu_a_loop_keeps_no_other_form_of_kernels(tiny, batch, dtype, name):
    """Neither transposed nor in float32, which would be three times a bfloat16 model's memory.

    Of the table of tokens, as wide as c_proj here, only the rows that are looked up are float32.
    """
    model = tiny[0].clone(dtype=dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny[1])
    settings = make_settings(SamplingOptions(), [0] * batch)
    state = engine.start(model, params, [[1, 2, 3]] * batch, 40, settings)
    program = engine.run.on(model).lower(model, params, state, 1).compile().as_text()
    assert f"{name}[32,128]" in program  # as c_proj is given
    made = r"= \w+\[(?:32,128|128,32)\]\S* (?!parameter|get-tuple-element|bitcast)[\w\-]+\("
    forms = {line.strip() for line in program.splitlines() if re.search(made, line)}
    takes = re.compile(r" (?:gather|dynamic-slice)\(")  # rows of the table, in a fusion
    fusions = [part for part in program.split("\n\n") if takes.search(part)]
    assert all(any(f" {line}\n" in part for part in fusions) for line in forms)


@pytest.mark.parametrize(
    ("name", "topology", "batch"),
    [
        ("gpt-neo-125m", "v5e:1x1", 8),  # heads of 64, 12 of them; a leaf fits into fast memory
        ("gpt-neo-125m", "v5e:2x2", 64),  # 3 heads a device
        ("gpt-neo-1.3b", "v5e:1x1", 8),  # 16 heads of 128 fill a tile, weights are most of it
        ("gpt-neo-2.7b", "v5e:2x2", 64),  # 5 heads a device
    ],
)
def test_on_a_tpu_a_step_reads_weights_and_cache_once(name, topology, batch):
    """The published shapes, four layers of them; the full table is benchmarks/decode_traffic.py.

    With few tokens to choose from: to compile the sorting of 50,000 takes as long as all the rest.
    """
    config = dataclasses.replace(preset(name), num_layers=4, vocab_size=1024)
    step = compile_step(config, topology, batch)
    assert step.copies == []
    assert step.temporaries <= 0.05 * step.cache
    assert 0.8 <= step.traffic / (step.weights + step.cache) <= 1.1


def test_on_a_tpu_a_chunk_of_a_prompt_is_written_as_slices(monkeypatch):
    """Two a row and layer in the place of one a token, in a cache that is not copied."""
    config = dataclasses.replace(preset("gpt-neo-125m"), num_layers=2, vocab_size=1024)
    chunk = compile_chunk(config, "v5e:1x1")
    assert chunk.copies == []
    assert chunk.temporaries <= 0.05 * chunk.cache
    monkeypatch.setattr(cache_write, "FEW", 256)
    one_by_one = compile_chunk(config, "v5e:1x1", trips=256)
    assert chunk.traffic <= 1.02 * one_by_one.traffic


@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_only_kernels_of_heads_are_laid_out_in_another_order(topology):
    devices = find_topology(topology).devices
    sharding = make_sharding(f"model={len(devices)}", "tensor", devices=devices)
    axes = ("embed", "heads", "head_dim")
    place = sharding.named(axes, (2048, 16, 128))
    assert tpu_layout(place, axes) == Format(Layout((1, 0, 2)), place)
    for others in (("heads", "head_dim", "embed"), ("mlp", "embed"), ("vocab", "embed")):
        place = sharding.named(others, (64, 128, 2048)[: len(others)])
        assert tpu_layout(place, others) is place
    here = make_sharding("model=8", "tensor").named(axes, (2048, 16, 128))
    assert tpu_layout(here, axes) is here


PROGRAM = """HloModule step

%update (old: f32[4,256], new: f32[1,256], row: s32[]) -> f32[4,256] {
  %old = f32[4,256]{1,0} parameter(0)
  %new = f32[1,256]{1,0} parameter(1)
  %row = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %put = f32[4,256]{1,0} dynamic-update-slice(%old, %new, %row, %zero)
}

%body (carry: (f32[4,256], f32[1,256], s32[])) -> (f32[4,256], f32[1,256], s32[]) {
  %carry = (f32[4,256]{1,0}, f32[1,256]{1,0}, s32[]) parameter(0)
  %x = f32[4,256]{1,0} get-tuple-element(%carry), index=0
  %y = f32[1,256]{1,0} get-tuple-element(%carry), index=1
  %i = s32[] get-tuple-element(%carry), index=2
  %near = (f32[4,256]{1,0:S(1)}, f32[4,256]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %there = f32[4,256]{1,0:S(1)} copy-done(%near)
  %sum = f32[4,256]{1,0:S(1)} add(%there, %x)
  %z = f32[4,256]{1,0} fusion(%x, %y, %i), kind=kLoop, calls=%update
  ROOT %next = (f32[4,256]{1,0}, f32[1,256]{1,0}, s32[]) tuple(%z, %y, %i)
}

ENTRY %main (state: (f32[4,256], f32[1,256], s32[])) -> (f32[4,256], f32[1,256], s32[]) {
  %state = (f32[4,256]{1,0}, f32[1,256]{1,0}, s32[]) parameter(0)
  ROOT %done = (f32[4,256]{1,0}, f32[1,256]{1,0}, s32[]) while(%state), body=%body
}
"""


def test_traffic_is_what_crosses_main_memory():
    """Read once into fast memory, once by the sum; a row of it is read and written in place."""
    program = Program(PROGRAM, trips=1)
    whole, row, index = 4 * 4 * 256, 4 * 256, 4
    assert program.loops() == ["body"]
    assert program.traffic("body") == whole + whole + (row + index) + row
