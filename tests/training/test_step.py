"""training/step.py: one step, its parts, and gradients that are not finite."""

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.config import ModelConfig
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding
from neo_jax.training import step as training_step
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.next_token import Batch, NextToken
from neo_jax.training.optimizer import make_optimizer, make_schedule
from neo_jax.training.step import init_state, make_step, state_of, state_shardings
from neo_jax.transforms.lora import LoraConfig

CONFIG = TrainConfig(
    data="",
    output="",
    steps=10,
    batch_size=8,
    model=ModelConfig(
        num_layers=2, embed_dim=32, num_heads=2, vocab_size=96, max_length=32, window_size=8
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, weight_decay=0.1),
    dtype="float32",
)


@pytest.fixture(scope="module")
def params():
    draw = jax.jit(lambda key: init_params(Neo(CONFIG.model), key))
    return stack(draw(jax.random.key(0)), CONFIG.model)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    weights = rng.integers(0, 2, (8, 32)).astype(np.float32)
    return Batch(jnp.asarray(rng.integers(0, 96, (8, 33), np.int32)), jnp.asarray(weights))


def params_copy(params):
    return jax.tree.map(jnp.copy, params)


@functools.cache
def programs(config, sharding=None):
    """The model, the optimizer and the step of a run, whose program is traced once."""
    model = Neo(config.model, sharding=sharding, dropout=config.dropout)
    optimizer = make_optimizer(config.optimizer, config.steps)
    return model, optimizer, make_step(model, optimizer, config)


def one_step(config, params, batch, sharding=None):
    model, optimizer, step = programs(config, sharding)
    state = state_of(params_copy(params), optimizer)
    if sharding:
        state = jax.device_put(state, state_shardings(model, optimizer, state))
        batch = jax.device_put(batch, sharding.named(("batch", None), (8, 33), "batch"))
    return step(state, batch)


@pytest.mark.parametrize(("accumulation", "mesh"), [(2, ""), (4, ""), (2, "data=2,fsdp=2,model=2")])
def test_parts_of_a_batch_add_up_to_it(params, batch, accumulation, mesh):
    """Predictions count by their weight, whichever part they are in."""
    whole, expected = one_step(CONFIG, params, batch)
    config = dataclasses.replace(CONFIG, accumulation=accumulation)
    parts, found = one_step(config, params, batch, make_sharding(mesh))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    norms = float(found["gradient_norm"]), float(expected["gradient_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(parts.opt_state), jax.tree.leaves(whole.opt_state), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_adapters_add_up_too_and_the_frozen_model_stays(params, batch):
    states = []
    before = jax.tree.map(np.array, params)
    for accumulation in (1, 4):
        lora = LoraConfig(rank=2, alpha=64.0)
        config = dataclasses.replace(CONFIG, accumulation=accumulation, lora=lora)
        model, optimizer = Neo(config.model), make_optimizer(config.optimizer, config.steps)
        step = make_step(model, optimizer, config)
        state = init_state(model, optimizer, 0, lora)
        for _ in range(2):
            state, metrics = step(state, batch, params)
        states.append((state.opt_state, metrics["loss"]))
    for ours, theirs in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_frozen_model_gets_no_gradient(params, batch):
    """Not even one that is thrown away: the compiled step lacks its FLOPs."""

    def flops(config, *frozen):
        model, optimizer = Neo(config.model), make_optimizer(config.optimizer, config.steps)
        state = jax.eval_shape(lambda: init_state(model, optimizer, 0, config.lora))
        step = make_step(model, optimizer, config)
        return step.lower(state, batch, *frozen).compile().cost_analysis()["flops"]

    whole = flops(CONFIG)
    lora = dataclasses.replace(CONFIG, lora=LoraConfig(rank=1))
    forward = jax.jit(lambda p: NextToken().loss(Neo(CONFIG.model), p, batch)).lower(params)
    forward = forward.compile().cost_analysis()["flops"]
    # Of the products, a third is the forward pass, and a third the gradient of activations.
    assert flops(lora, params) - forward < 0.7 * (whole - forward)


def test_no_loop_scatters_into_a_table(params, batch):
    """What a TPU's compiler may sum wrongly: openxla/xla issue 49143."""
    model, config = Neo(CONFIG.model), dataclasses.replace(CONFIG, accumulation=4)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(model, optimizer, config)
    program = jax.make_jaxpr(step)(state_of(params, optimizer), batch)
    tables = {params[name]["embedding"].shape for name in ("wte", "wpe")}
    inside = [looped for looped, shape in scatters(program.jaxpr) if shape in tables]
    assert inside == [False, False]


def scatters(jaxpr, looped=False):
    """Yields whether each scatter of a program is in a loop, and the shape of what it gives."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.startswith("scatter"):
            yield looped, equation.outvars[0].aval.shape
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from scatters(inner, looped or name in ("scan", "while"))


def test_a_step_without_finite_gradients_changes_nothing_and_counts(params, batch):
    _, optimizer, step = programs(CONFIG)
    broken = batch._replace(weights=batch.weights.at[3, 4].set(jnp.nan))
    state = state_of(params_copy(params), optimizer)
    counts = []
    for part in (batch, broken, broken, batch, broken):
        before = jax.tree.map(np.array, (state.params, state.opt_state))
        state, metrics = step(state, part)
        counts.append((int(metrics["skipped"]), int(metrics["skipped_in_a_row"])))
        same = jax.tree.map(np.array_equal, before, (state.params, state.opt_state))
        assert all(jax.tree.leaves(same)) == (part is broken)
        if part is not broken:  # the schedule was at this step, skipped ones included
            assert int(state.opt_state[1][-1].count) == int(state.step)
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert int(state.step) == 5


def test_a_prediction_counts_by_its_share_of_all_weights(params, batch):
    """Gradients are those of the mean loss: half the weights, or as many again of none, no less."""
    _, optimizer, step = programs(CONFIG)
    found = []
    for weights in (batch.weights, batch.weights / 2):
        state = state_of(params_copy(params), optimizer)
        found.append(step(state, batch._replace(weights=weights))[1])
    for name in ("loss", "gradient_norm"):
        assert float(found[1][name]) == pytest.approx(float(found[0][name]), rel=1e-5)


def test_each_part_of_a_batch_draws_its_own_dropout(params, batch, monkeypatch):
    """Else what is dropped of one sequence would be dropped of those in its place elsewhere."""

    def drawn(self, model, params, part, *, key, **options):
        draw = jax.random.uniform(key) + 0 * params["wpe"]["embedding"].sum()
        return Sums(draw, draw**2, jnp.ones(()))

    monkeypatch.setattr(NextToken, "loss", drawn)
    for accumulation in (1, 4):
        config = dataclasses.replace(CONFIG, accumulation=accumulation, dropout=0.5)
        key = jax.random.fold_in(jax.random.key(config.seed), 0)
        draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(accumulation)]
        found = one_step(config, params, batch)[1]["loss"]
        assert float(found) == pytest.approx(float(np.mean(draws)), rel=1e-6)


SCHEDULED = OptimizerConfig(
    learning_rate=1e-3, warmup_steps=1, schedule="linear", final_fraction=0.1, clip_norm=0.0
)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_the_learning_rate_follows_the_step_also_past_skipped_ones(name):
    """What is reported is what is applied, and the last step has the final rate.

    Of Lion every weight moves by the rate; of the others, the more their gradients are alike.
    """
    optimizer = make_optimizer(dataclasses.replace(SCHEDULED, name=name), 5)
    params = {"layer": {"kernel": jnp.ones((4, 3))}}
    state = optimizer.init(params)
    rates = []
    for step in range(5):
        slots = training_step._at_step(state, jnp.int32(step))
        updates, new = optimizer.update(jax.tree.map(jnp.ones_like, params), slots, params)
        rates.append(float(jnp.abs(updates["layer"]["kernel"]).max()))
        state = state if step in (1, 2) else new  # those were skipped
    schedule = make_schedule(SCHEDULED, 5)
    expected = [float(schedule(step)) for step in range(5)]
    np.testing.assert_allclose(rates, expected, rtol=1e-3, atol=1e-9)


def test_dropout_depends_on_seed_and_step_alone(params, batch):
    config = dataclasses.replace(CONFIG, dropout=0.3)
    losses = {
        name: float(one_step(changed, params, batch)[1]["loss"])
        for name, changed in {
            "none": CONFIG,
            "some": config,
            "again": config,
            "other seed": dataclasses.replace(config, seed=1),
        }.items()
    }
    assert losses["some"] == losses["again"]
    assert len(set(losses.values())) == 3
    on_mesh = one_step(config, params, batch, make_sharding("data=2,fsdp=2,model=2"))
    assert float(on_mesh[1]["loss"]) == pytest.approx(losses["some"], rel=1e-5)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_other_optimizers_on_a_mesh(name, batch):
    """Adafactor's vectors are everywhere; all else lies as its parameter does."""
    config = dataclasses.replace(
        CONFIG,
        model=dataclasses.replace(CONFIG.model, embed_dim=128, head_dim=64, mlp_dim=256),
        optimizer=dataclasses.replace(CONFIG.optimizer, name=name),
    )
    results = []
    for sharding in (None, make_sharding("data=2,fsdp=2,model=2")):
        model = Neo(config.model, sharding=sharding)
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = init_state(model, optimizer, 0)
        results.append(one_step(config, state.params, batch, sharding)[0])
    if name == "adafactor":
        shapes = {leaf.shape for leaf in jax.tree.leaves(results[0].opt_state)}
        assert (1, 128) in shapes  # the rows and columns of a matrix, for each unit
    for ours, theirs in zip(
        jax.tree.leaves(results[1].params), jax.tree.leaves(results[0].params), strict=True
    ):
        scale = np.linalg.norm(theirs)
        assert np.linalg.norm(np.asarray(ours) - np.asarray(theirs)) <= 1e-4 * scale
