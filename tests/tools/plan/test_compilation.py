"""Compiled programs are found again, unless anything differs."""

import jax
import jax.numpy as jnp
import pytest

from neo_jax.devices.compilation_cache import kept_plans
from neo_jax.tools.plan import compilation
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler


@pytest.fixture
def folder(monkeypatch, tmp_path):
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "plans"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def compiled(monkeypatch):
    """How often the compiler was called."""
    calls = []
    compile_once = compilation._compile

    def counted(lowered):
        calls.append(lowered)
        return compile_once(lowered)

    monkeypatch.setattr(compilation, "_compile", counted)
    return calls


def lowered(topology, size=128):
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=place)
    return jax.jit(lambda x: x @ x).lower(x)


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_a_program_is_compiled_once(folder, compiled):
    topology = find_topology("v5e:1x1")
    first = compile_for(lowered(topology), topology)
    assert "ENTRY" in first.text
    assert first.total >= first.arguments == 128 * 128 * 4
    assert compile_for(lowered(topology), topology) == first
    assert len(compiled) == 1
    other = compile_for(lowered(topology, 256), topology)
    assert other.arguments == 256 * 256 * 4
    assert len(compiled) == 2
    (kept, _) = folder.iterdir()
    kept.write_bytes(kept.read_bytes()[:50])  # as after a crash of the machine
    assert compile_for(lowered(topology), topology)[1:5] == first[1:5]
    assert compile_for(lowered(topology, 256), topology)[1:5] == other[1:5]
    assert len(compiled) == 3


def test_nothing_is_kept_where_jax_keeps_nothing(folder):
    assert kept_plans() == folder
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert kept_plans() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/programs")
    assert kept_plans() is None
