"""tools/benchmark/limits.py: what devices can do, in few and small repeats."""

import jax
import pytest

from neo_jax.tools.benchmark import limits
from neo_jax.tools.benchmark.limits import measure_limits


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(limits, "_SIZES", (64, 128))
    monkeypatch.setattr(limits, "_REPEATS", 2)


@pytest.mark.parametrize("number", [1, 2])
def test_limits_are_positive_and_say_what_reached_them(number):
    found = measure_limits(jax.devices()[:number], read_bytes=2**20)
    assert set(found.products) == set(found.product_shapes) == {"float32", "bfloat16"}
    assert all(rate > 0 for rate in found.products.values())
    assert all(
        shape in ("64 x 64 x 64", "128 x 128 x 128") for shape in found.product_shapes.values()
    )
    assert found.bandwidth > 0
    assert f"of {2**18 // number // 1024} x 1024" in found.reading or "x 4096" in found.reading


def test_the_best_of_shapes_and_repeats_counts(monkeypatch):
    times = iter([0.5, 8.0, 0.1, 0.4])  # of products of 64 and 128, twice

    def best(programs):
        assert len(programs) == 3
        return next(times)

    monkeypatch.setattr(limits, "_best_seconds", best)
    monkeypatch.setattr(limits, "_LONG_ENOUGH", 1.0)
    devices = jax.devices()[:3]
    assert limits._products(devices, "float32") == (3 * 2 * 64**3 / 0.5, "64 x 64 x 64")
    assert limits._products(devices, "float32") == (3 * 2 * 128**3 / 0.4, "128 x 128 x 128")


def test_all_devices_work_at_once(monkeypatch):
    placed = limits._on_each(jax.devices()[:3], limits._sums, jax.numpy.ones((2, 8)), 0)
    assert [out.devices() for out in (program() for program in placed)] == [
        {device} for device in jax.devices()[:3]
    ]
    assert limits._best_seconds(placed) > 0


def test_short_programs_are_queued_together(monkeypatch):
    """On a GPU the start of a call takes as long as reading hundreds of megabytes."""
    clock, calls = [0.0], []

    def program():
        calls.append(clock[0])
        clock[0] += 1e-3

    monkeypatch.setattr(limits.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(limits.jax, "block_until_ready", lambda _: clock.append(0))
    assert limits._best_seconds([program, program]) == pytest.approx(2e-3)
    assert len(calls) == 2 * (1 + 1 + 2 * 10)  # to compile, to guess, and 20 ms at once
