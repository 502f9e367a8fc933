"""What XLA's CPU backend makes of a training step: what it must not copy, or compute again."""

import re

import jax
import pytest

from neo_jax.config import ModelConfig
from neo_jax.model.transformer import Neo
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import abstract_inputs, abstract_state, make_step

pytestmark = pytest.mark.optimized

CONFIG = TrainConfig(
    data="",
    output="",
    steps=10,
    batch_size=3,
    model=ModelConfig(
        num_layers=6, embed_dim=32, num_heads=2, vocab_size=96, max_length=40, window_size=8
    ),
    optimizer=OptimizerConfig(warmup_steps=0, weight_decay=0.1),
    dtype="float32",
)


@pytest.fixture(scope="module")
def instructions():
    """Of the step of a model with six layers: names, shapes, and what each one takes."""
    model, optimizer = Neo(CONFIG.model), make_optimizer(CONFIG.optimizer, CONFIG.steps)
    shapes = abstract_state(model, optimizer), *abstract_inputs(CONFIG, model)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)
    text = make_step(model, optimizer, CONFIG).lower(*shapes).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    found = re.findall(r"\n +(?:ROOT )?%(\S+) = (\w+\[[\d,]*\])\S* (\w+)\(([^)]*)\)", entry)
    assert len(found) > 100
    return {name: (shape, op, re.findall(r"%([\w.]+)", takes)) for name, shape, op, takes in found}


def test_what_the_optimizer_keeps_changes_in_its_place(instructions):
    """Moments are read by what forms the new ones alone: where more read them, XLA copies all."""
    copied = [takes for _, op, takes in instructions.values() if op == "copy"]
    assert not [name for takes in copied for name in takes if "mu__" in name or "nu__" in name]


def test_the_gradient_of_the_residual_stream_is_summed_once(instructions):
    """A sum of many branches is one that each of the layers forms again."""
    stream = "f32[3,40,32]"
    sums = [
        sum(instructions[name][0] == stream for name in takes)
        for shape, op, takes in instructions.values()
        if op == "fusion" and shape == stream
    ]
    assert 1 <= max(sums) <= 4
