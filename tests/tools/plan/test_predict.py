"""How long a step takes, by hand."""

import dataclasses
import math

import pytest

from neo_jax.devices.chips import CHIPS, UNKNOWN, Chip, Reached
from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.hlo_cost import Work
from neo_jax.tools.plan.predict import (
    EXPOSED,
    LATENCY,
    LAUNCH,
    Phase,
    bound,
    collective_seconds,
    predict,
)

CHIP = Chip(100, 1000, 50, 5, 1, 10, Reached(products=0.5, memory=0.8, links=0.9, network=0.5))


@pytest.mark.parametrize(
    ("work", "name", "seconds"),
    [
        (Work(100, 40), "products", 2),
        (Work(100, 40, hidden_flops=50), "products", 3),
        (Work(100, 120), "memory", 3),
        (Work(100, 120, vector_ops=40), "vectors", 4),
        (Work(0, 0), "memory", -LAUNCH),  # does nothing, and takes nothing
    ],
)
def test_what_bounds_an_instruction(work, name, seconds):
    told, took = bound(CHIP, work)
    assert told == name
    assert took == pytest.approx(seconds + LAUNCH)


def test_links_and_the_network():
    ring = Traffic("all-gather", ("fsdp",), 3, 90)
    assert collective_seconds(CHIP, ring) == pytest.approx(10 + 3 * LATENCY)
    line = ring._replace(links=1.0)
    assert collective_seconds(CHIP, line) == pytest.approx(20 + 3 * LATENCY)
    assert collective_seconds(CHIP, ring._replace(between_slices=True)) == 180
    assert collective_seconds(UNKNOWN, ring._replace(wire_bytes=0)) == 0


def test_collectives_hide_behind_the_instructions_of_their_phase():
    work, sent = (2, Work(100, 0)), Traffic("all-gather", ("fsdp",), 0, 90)  # 4 s, 10 s
    alone = predict(CHIP, [Phase([], [sent])])
    assert alone.step == pytest.approx(10)
    hidden = predict(CHIP, [Phase([work], [sent])])
    assert hidden.products == pytest.approx(4, abs=1e-5)
    assert hidden.waiting == pytest.approx(10 * EXPOSED, abs=1e-5)
    assert hidden.collectives == pytest.approx(10)
    much = [sent] * 10  # what could be hidden is more than there is to hide it
    crowded = predict(CHIP, [Phase([work], much)])
    assert crowded.step == pytest.approx(100, abs=1e-5)


def test_phases_come_one_after_another():
    one, other = Phase([(1, Work(100, 0))], []), Phase([(3, Work(0, 40))], [])
    both = predict(CHIP, [one, other])
    assert (both.products, both.memory) == pytest.approx((2, 3), abs=1e-4)
    assert both.step == sum(both.parts.values())


def test_an_unknown_chip():
    assert math.isnan(predict(UNKNOWN, [Phase([(1, Work(1, 1))], [])]).step)


def test_every_tpu_that_trains_has_its_figures():
    """Those that a prediction needs, of all that can be rented since v4."""
    for kind in ("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e", "TPU7x"):
        chip = CHIPS[kind]
        known = dataclasses.astuple(chip)[:6]
        missing = [value for value in known if not isinstance(value, float | int) or value != value]
        assert len(missing) == (kind == "TPU v4"), kind  # its network
        assert 0.5 < chip.reached.products < 1
