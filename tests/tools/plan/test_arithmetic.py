"""A step on paper, against the step as it is traced."""

import dataclasses
import functools

import jax
import pytest

from neo_jax.config import ModelConfig
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.arithmetic import Setup, again, phases, shape_of
from neo_jax.tools.plan.estimate import Choice, estimated_phases
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.tools.plan.steps import training_step
from neo_jax.training.config import TrainConfig

MODEL = ModelConfig(
    num_layers=4, embed_dim=128, num_heads=4, vocab_size=512, max_length=256, window_size=64
)


def flops(phases):
    return sum(times * work.flops for phase in phases for times, work in phase.works)


@pytest.mark.parametrize(("remat", "accumulation"), [("none", 1), ("full", 1), ("full", 2)])
def test_products_are_those_of_the_step(remat, accumulation):
    """All pairs of attention: what blocks form is the kernel's."""
    config = TrainConfig(
        "", "", 1, 8, MODEL, remat=remat, accumulation=accumulation, kernel="dense"
    )
    sharding = make_sharding("fsdp=4", "", jax.devices()[:4])
    step = training_step(config, sharding)
    setup = Setup(
        2 / accumulation, MODEL.max_length, fsdp=4, accumulation=accumulation,
        again=again(remat, shape_of(MODEL)), side=-1,
    )  # fmt: skip
    ours = flops(phases(shape_of(MODEL), setup))
    theirs = traced_flops(step.trace(), MODEL) / 4
    assert ours == pytest.approx(theirs, rel=0.02)


def sent(choice, **axes):
    config = TrainConfig("", "", 1, 16, dataclasses.replace(MODEL, num_layers=4))
    made = estimated_phases(config, Choice(**{**dataclasses.asdict(choice), **axes}))
    rows = [row for phase in made for row in phase.traffic]
    return {
        axis: sum(row.wire_bytes for row in rows if row.axes == (axis,))
        for axis in ("fsdp", "data", "model", "context")
    }


def test_what_is_sent_by_strategy():
    """Weights in bfloat16 forward and backward and their gradients in float32; sums by `data`."""
    params = shape_of(MODEL).params
    whole = sent(Choice(fsdp=8))
    assert whole["fsdp"] == pytest.approx((2 + 2 + 4) * params * 7 / 8, rel=1e-3)
    assert whole["data"] == whole["model"] == whole["context"] == 0
    copies = sent(Choice(data=8))
    assert copies["data"] == pytest.approx(2 * 4 * params * 7 / 8, rel=1e-3)
    tokens = 16 // 4 * MODEL.max_length
    split = sent(Choice(fsdp=4, model=2))
    # Two sums forward, one of them again, and two backward.
    assert split["model"] == 5 * MODEL.num_layers * 2 * 4 * tokens * MODEL.embed_dim // 2


def test_a_window_is_what_neighbours_send():
    def exchanged(window):
        model = dataclasses.replace(MODEL, attention_types=("local",), window_size=window)
        config = TrainConfig("", "", 1, 8, model)
        made = estimated_phases(config, Choice(fsdp=2, context=4))
        return sum(
            row.wire_bytes for phase in made for row in phase.traffic if row.axes == ("context",)
        )

    assert exchanged(65) == 64 / 192 * exchanged(256)


def test_more_devices_do_less_each():
    at = functools.partial(Choice, remat="full")
    config = TrainConfig("", "", 1, 16, MODEL)
    assert flops(estimated_phases(config, at(fsdp=8))) == pytest.approx(
        flops(estimated_phases(config, at(fsdp=4))) / 2
    )
