"""Plans of true steps by the true compiler, of models small enough for it to be quick."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from neo_jax.config import ModelConfig, preset
from neo_jax.devices.memory import tree_bytes
from neo_jax.errors import NeoError
from neo_jax.model.flops import flops_per_token
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan import report
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.tools.plan.plan import make_plan
from neo_jax.tools.plan.steps import decode_step, prefill_step, training_step
from neo_jax.tools.plan.topology import find_topology
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.transforms.lora import LoraConfig

pytestmark = pytest.mark.tpu_compiler

MODEL = ModelConfig(
    num_layers=12, embed_dim=256, num_heads=4, vocab_size=1000, max_length=256, window_size=64
)
RUN = TrainConfig("", "", 10, batch_size=16, model=MODEL, remat="full")


def train(topology, mesh, **changes):
    topology = find_topology(topology)
    sharding = make_sharding(mesh, "", topology.devices)
    return make_plan(training_step(dataclasses.replace(RUN, **changes), sharding), topology)


@pytest.fixture(scope="module")
def plan():
    return train("v5e:2x4", "fsdp=4,model=2")


def test_arguments_are_what_the_compiler_says(plan):
    assert sum(plan.memory.parts.values()) == plan.memory.arguments
    assert sum(plan.memory.parts_without_padding.values()) < plan.memory.arguments
    assert plan.fits
    assert plan.memory.total > plan.memory.arguments + plan.memory.temporaries
    assert plan.memory.capacity == 16 * 2**30


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraConfig(rank=4), "optimizer": OptimizerConfig("adafactor")},
        {"accumulation": 2, "optimizer": OptimizerConfig("lion")},
    ],
    ids=["lora", "accumulation"],
)
def test_arguments_of_other_runs(changes):
    plan = train("v5e:2x2", "fsdp=4", **changes)
    assert sum(plan.memory.parts.values()) == plan.memory.arguments


@pytest.mark.parametrize("kind", [prefill_step, decode_step])
def test_arguments_of_decoding(kind):
    topology = find_topology("v5e:2x2")
    sharding = make_sharding("model=4", "decode", topology.devices)
    config = dataclasses.replace(MODEL, num_layers=2)
    model = Neo(config, jnp.bfloat16, sharding=sharding)
    plan = make_plan(kind(model, 8, 256), topology)
    missing = sum(plan.memory.parts.values()) - plan.memory.arguments
    params = plan.step.parts["parameters"]
    # Prefill needs of the last layer no more than its keys and values.
    unused = tree_bytes((params["h_1"], params["ln_f"]), tiled=True)
    assert missing == 0 if kind is decode_step else 0 < missing < unused


GPT2 = ModelConfig(
    num_layers=1, embed_dim=320, num_heads=5, vocab_size=1000, max_length=128,
    attention_types=("global",), qkv_bias=True, scale_attention=True,
)  # fmt: skip


@pytest.mark.parametrize(("topology", "kind"), [("v5e:2x2", "train"), ("cpu:4", "decode")])
def test_heads_that_divide_over_no_axis_stay_whole(topology, kind):
    """As the 25 of GPT-2 XL, whose biases are arguments too."""
    topology = find_topology(topology)
    rules = "embed:fsdp,mlp:model,vocab:model"
    sharding = make_sharding("fsdp=2,model=2", rules, topology.devices)
    if kind == "train":
        step = training_step(dataclasses.replace(RUN, model=GPT2), sharding)
    else:
        step = decode_step(Neo(GPT2, jnp.bfloat16, sharding=sharding), 4, 128)
    plan = make_plan(step, topology)
    assert sum(plan.memory.parts.values()) == plan.memory.arguments
    assert plan.fits
    assert {row.axes for row in plan.traffic} >= {("fsdp",), ("model",)}
    other = make_sharding("fsdp=2,model=2", "decode", topology.devices)
    with pytest.raises(NeoError, match=r"'heads' of size 5 does not divide over 2 devices"):
        decode_step(Neo(GPT2, jnp.bfloat16, sharding=other), 4, 128)


@pytest.mark.parametrize("name", ["gpt-neo-125m", "gpt-neo-1.3b"])
def test_useful_products_are_six_a_parameter_and_token_and_attention(name):
    run = dataclasses.replace(RUN, model=preset(name), remat="full", accumulation=2)
    step = training_step(run, make_sharding("fsdp=8"))
    expected = flops_per_token(run.model, 2048) * step.tokens
    assert traced_flops(step.trace_useful(), run.model) == pytest.approx(expected, rel=0.05)
    assert 1.15 * expected < traced_flops(step.trace(), run.model) < 4 / 3 * expected


def test_devices_share_the_products(plan):
    alone = train("v5e:1x1", "fsdp=1").work.flops
    assert plan.work.flops * 8 <= 1.05 * alone
    many = train("v5e:4x4", "data=4,fsdp=4")
    assert many.work.flops * 16 <= 1.05 * alone
    pod = train("v5e:16x16", "data=16,fsdp=16", batch_size=256)
    assert pod.work.flops * 256 <= 1.05 * alone * 256 / RUN.batch_size
    assert plan.work.flops == pytest.approx(plan.useful_flops + plan.repeated_flops, rel=0.1)


def test_the_program_does_not_grow_with_the_depth(plan):
    deep = train(
        "v5e:2x4", "fsdp=4,model=2", model=dataclasses.replace(MODEL, num_layers=48)
    )  # fmt: skip
    assert len(deep.program) <= 1.3 * len(plan.program)
    assert deep.work.flops > 3 * plan.work.flops


def test_a_kernel_of_devices_that_are_not_here():
    config = dataclasses.replace(RUN, kernel="splash", dtype="bfloat16")
    sharding = make_sharding("fsdp=4", "", find_topology("v5e:2x2").devices)
    assert "splash_mha_fwd" in str(training_step(config, sharding).trace().jaxpr)


def test_slices_are_joined_by_the_network():
    plan = train("2*v5e:4x4", "data=2,fsdp=16", batch_size=32)
    weights = 4 * sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(plan.step.parts["parameters"])
    )
    far = [row for row in plan.traffic if row.between_slices]
    assert [(row.kind, row.axes) for row in far] == [("all-reduce", ("data",))]
    assert weights <= far[0].wire_bytes <= 1.5 * weights  # twice the half of the gradients
    assert plan.roofline.network == far[0].wire_bytes / 3.125e9
    assert all(row.axes == ("fsdp",) for row in plan.traffic if not row.between_slices)
    assert sum(plan.memory.parts.values()) == plan.memory.arguments


def test_what_does_not_fit_is_told_with_the_compilers_total():
    model = dataclasses.replace(MODEL, vocab_size=6_000_000)
    plan = train("v5e:1x1", "fsdp=1", model=model, batch_size=1)
    assert not plan.fits
    assert "HBM" in plan.refusal
    assert plan.memory.arguments is None
    assert 15 * 2**30 < plan.memory.capacity < 16 * 2**30  # what the compiler may use
    parts = 12 * model.num_params  # weights, and two slots of AdamW
    assert sum(plan.memory.parts.values()) == pytest.approx(parts, rel=0.01)
    assert plan.memory.total > parts
    table = "\n".join(report.lines(plan))
    assert "by the compiler, which refuses; the rest by arithmetic" in table
    assert report.describe(plan)["fits"] is False


def test_a_plan_for_people_and_for_programs(plan):
    table = "\n".join(report.lines(plan))
    for part in ("parameters", "optimizer", "of it padding", "fits", "useful", "MFU at most"):
        assert part in table
    fields = report.describe(plan)
    assert fields["memory"]["parts"] == plan.memory.parts
    assert fields["roofline_ms"]["step"] == max(fields["roofline_ms"].values())
    assert 0 < fields["mfu"] < 1
    assert not any(isinstance(v, float) and math.isnan(v) for v in fields["roofline_ms"].values())
    assert report.draw(plan).startswith(b"\x89PNG")
