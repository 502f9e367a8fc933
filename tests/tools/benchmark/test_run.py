"""tools/benchmark/run.py: what is counted of a step, and what cannot run."""

import dataclasses
import functools
import math
import time

import jax
import pytest

from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.benchmark import run
from neo_jax.tools.benchmark.limits import Limits
from neo_jax.tools.benchmark.run import (
    Budget,
    CannotRunError,
    Measurement,
    PreparedStep,
    Setup,
    bench,
    measure,
    random_params,
)

BATCH, LENGTH = 2, 32
LIMITS = Limits({"float32": 1e11, "bfloat16": 2e11}, {}, 1e10, "")


@pytest.fixture
def budget():
    return Budget(time.perf_counter() + 600, 1e11)


@pytest.fixture(scope="module")
def small(tiny_config):
    """Two layers are enough."""
    return Neo(dataclasses.replace(tiny_config, num_layers=2))


@pytest.fixture(scope="module")
def figures(small):
    """Returns what is measured of a small model on a mesh, by kind and batch."""

    def figures(mesh, kinds, batches):
        sharding = make_sharding(mesh, "", jax.devices()[:2], default="decode") if mesh else None
        model = small.clone(sharding=sharding)
        load = functools.partial(random_params, model)
        sizes = (batches, (LENGTH,))
        setup = Setup("small", model, load, None, kinds, *sizes, "none", 600)
        told = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "measure_limits", lambda devices: LIMITS)
            patch.setattr(run, "_LONG_ENOUGH", 1e-6)
            result = bench(setup, told.append)
        assert told == result.measurements
        return {step.kind: step for step in result.measurements}

    return figures


@pytest.fixture(scope="module")
def results(figures):
    return figures("", ("train", "decode", "prefill"), (BATCH,))


def test_speed_and_time_belong_together(results):
    assert list(results) == ["prefill", "decode", "train"]
    for step in results.values():
        assert step.note == ""
        assert step.repeats == run._REPEATS
        assert step.seconds > 0
        assert step.tokens_per_second * step.seconds == pytest.approx(step.tokens)
        assert step.tokens == step.batch * (1 if step.kind == "decode" else LENGTH)


def test_products_and_traffic_are_those_of_arithmetic(results, small):
    config, step = small.config, results["decode"]
    kernels = 12 * config.embed_dim**2 * config.num_layers
    head = config.padded_vocab_size * config.embed_dim
    slots = LENGTH + config.window_size + 16  # a global layer, a local one
    assert step.flops == 2 * BATCH * (kernels + head + 2 * slots * config.embed_dim)
    biases = (config.mlp_dim + 6 * config.embed_dim) * config.num_layers + 2 * config.embed_dim
    keys = BATCH * slots * (2 * config.embed_dim + 1)  # with their positions
    assert step.traffic == 4 * (kernels + biases + head + keys)

    prefill = results["prefill"]
    assert prefill.traffic == step.traffic - 4 * head
    needed = kernels - 10 * config.embed_dim**2  # of the last layer, keys and values alone
    assert prefill.flops > 2 * BATCH * LENGTH * needed
    train = results["train"]
    rest = config.max_length * config.embed_dim
    weights = 3 * 4 * (kernels + biases + head + rest)  # and AdamW's two for each
    assert train.traffic == pytest.approx(2 * weights, abs=100)  # counters
    assert train.flops > 3 * prefill.flops


def test_on_a_mesh_each_device_moves_what_it_holds(results, figures):
    one, mesh = results["decode"], figures("data=2", ("decode",), (1, 2))["decode"]
    assert mesh.batch == one.batch  # what both divide into
    assert mesh.flops == one.flops
    slots = LENGTH + 8 + 16
    keys = 4 * BATCH * slots * (2 * 32 + 1)
    assert mesh.traffic == 2 * one.traffic - keys  # weights are read twice, each row once


def test_what_would_take_too_long_is_left_out(tiny):
    model, params = tiny
    over = Budget(time.perf_counter() - 1, 1e11)
    step = measure("prefill", 1, 16, lambda: run.prepare_prefill(model, params, 1, 16, over), over)
    assert "0 s are left of --seconds" in step.note
    assert math.isnan(step.tokens_per_second)
    assert step.repeats == 0


def test_time_that_is_over_ends_repeats():
    over = Budget(time.perf_counter() - 1, 1e11)
    step = measure("decode", 2, 16, lambda: PreparedStep(1.0, 1.0, lambda: 0.5), over)
    assert step == Measurement("decode", 2, 16, 1.0, 1.0, 0.5, 1)
    assert step.tokens_per_second == 4


def test_out_of_memory_is_told_and_other_errors_are_not_hidden(budget):
    def fail(message):
        raise jax.errors.JaxRuntimeError(message)

    step = measure("train", 1, 16, lambda: fail("RESOURCE_EXHAUSTED: out of memory"), budget)
    assert step.note == "out of memory"
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure("train", 1, 16, lambda: fail("INTERNAL: broken"), budget)


def test_a_program_larger_than_the_memory_is_not_run(tiny, budget, monkeypatch):
    model, params = tiny
    monkeypatch.setattr(run, "device_memory", lambda devices: 1e3)
    for work in (run.prepare_prefill, run.prepare_decode):
        with pytest.raises(CannotRunError, match=r"out of memory: .* GB of 0.0 GB a device"):
            work(model, params, 1, 16, budget)
