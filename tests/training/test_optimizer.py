"""training/optimizer.py: the schedule by its formula, AdamW by torch's."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict

from neo_jax.training.config import OptimizerConfig
from neo_jax.training.optimizer import _decays, make_optimizer, make_schedule
from neo_jax.transforms.lora import LoraConfig, init_adapters

pytestmark = pytest.mark.optimized

STEPS = 100
CONFIG = OptimizerConfig(
    learning_rate=3e-2,
    warmup_steps=10,
    final_fraction=0.2,
    beta1=0.8,
    beta2=0.9,
    epsilon=1e-6,
    weight_decay=0.3,
    clip_norm=0.0,
)


def learning_rate(step):
    """Linear from 0 over the warm-up, then half a cosine down to the final fraction."""
    peak, warmup = CONFIG.learning_rate, CONFIG.warmup_steps
    if step < warmup:
        return peak * step / warmup
    final = peak * CONFIG.final_fraction
    done = min((step - warmup) / (STEPS - warmup), 1)
    return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2


@pytest.mark.parametrize("step", [0, 1, 5, 9, 10, 11, 30, 55, 99, 100, 1000])
def test_the_schedule_follows_its_formula(step):
    assert float(make_schedule(CONFIG, STEPS)(step)) == pytest.approx(learning_rate(step), rel=1e-6)


def test_the_corners_of_the_schedule():
    schedule = make_schedule(CONFIG, STEPS)
    corners = [float(schedule(step)) for step in (0, 5, 10, 55, 100)]
    assert corners == pytest.approx([0, 1.5e-2, 3e-2, 1.8e-2, 6e-3], rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_warm_up_longer_than_the_run_ends_with_its_last_step(steps):
    schedule = make_schedule(dataclasses.replace(CONFIG, warmup_steps=50), steps)
    rates = [float(schedule(step)) for step in range(steps)]
    warmup = max(steps - 1, 1)
    expected = [CONFIG.learning_rate * step / warmup for step in range(steps)]
    assert rates == pytest.approx(expected if steps > 1 else [CONFIG.learning_rate], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "values"), [("linear", [0, 3e-2, 1.8e-2, 6e-3]), ("constant", [0, 3e-2, 3e-2, 3e-2])]
)
def test_other_schedules(name, values):
    schedule = make_schedule(dataclasses.replace(CONFIG, schedule=name), STEPS)
    assert [float(schedule(step)) for step in (0, 10, 55, 100)] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_other_optimizers_minimise_and_decay(name):
    """A quadratic; and with a gradient of zero, only what decays becomes smaller, by lr x decay."""
    config = dataclasses.replace(CONFIG, name=name, warmup_steps=0, weight_decay=0.0)
    target = {"a": {"kernel": jnp.full((130, 140), 0.5)}, "b": {"bias": jnp.full(3, -0.5)}}
    params = jax.tree.map(jnp.zeros_like, target)
    optimizer = make_optimizer(config, STEPS)
    state = optimizer.init(params)
    for _ in range(STEPS):
        grads = jax.tree.map(jnp.subtract, params, target)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for ours, wanted in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True):
        assert float(jnp.abs(ours - wanted).max()) < 0.05
    config = dataclasses.replace(config, weight_decay=0.3)
    optimizer = make_optimizer(config, STEPS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(
        updates["a"]["kernel"], -0.3 * 3e-2 * params["a"]["kernel"], rtol=1e-5
    )
    assert not updates["b"]["bias"].any()


@pytest.mark.parametrize(("warmup", "steps"), [(0, 10), (0, 1), (3000, 10), (3000, 1), (9, 10)])
def test_runs_shorter_than_their_warm_up(warmup, steps):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=warmup)
    rates = [float(make_schedule(config, steps)(step)) for step in range(steps + 1)]
    assert all(math.isfinite(rate) for rate in rates)
    assert max(rates) == 1.0
    assert rates[0] == (1.0 if warmup == 0 or steps == 1 else 0.0)
    assert rates[-1] == pytest.approx(0.1)


def test_kernels_and_embeddings_decay_and_nothing_else(tiny):
    marks = flatten_dict(_decays(tiny[1]), sep="/")
    decayed = {path for path, mark in marks.items() if mark}
    layers = range(4)
    assert decayed == {"wte/embedding", "wpe/embedding"} | {
        f"h_{i}/{part}/kernel"
        for i in layers
        for part in ("attn/q_proj", "attn/k_proj", "attn/v_proj", "attn/out_proj",
                     "mlp/c_fc", "mlp/c_proj")
    }  # fmt: skip
    rest = {path.split("/")[-1] for path in marks if path not in decayed}
    assert rest == {"bias", "scale"}
    adapters = init_adapters(tiny[0].config, LoraConfig(rank=2), jax.random.key(0))
    assert all(jax.tree.leaves(_decays(adapters)))


def test_a_step_is_that_of_torch():
    """Ten steps over the warm-up and beyond, with the same gradients."""
    rng = np.random.default_rng(0)
    shapes = {"c_fc": {"kernel": (5, 7), "bias": (7,)}, "ln_1": {"scale": (5,), "bias": (5,)}}
    draw = lambda: jax.tree.map(  # noqa: E731
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    params = draw()
    theirs = {
        path: torch.nn.Parameter(torch.from_numpy(leaf.copy()))
        for path, leaf in flatten_dict(params, sep="/").items()
    }
    groups = [
        {
            "params": [leaf for path, leaf in theirs.items() if path.endswith("kernel") == decays],
            "weight_decay": CONFIG.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.epsilon)
    optimizer = make_optimizer(CONFIG, STEPS)
    state = optimizer.init(params)
    for step in range(15):
        grads = draw()
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for path, grad in flatten_dict(grads, sep="/").items():
            theirs[path].grad = torch.from_numpy(grad)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step)
        adamw.step()
        for path, leaf in flatten_dict(params, sep="/").items():
            expected = theirs[path].detach().numpy()
            np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-6, err_msg=path)


def test_a_step_of_lion_is_that_of_its_paper():
    """Chen et al., 2023, algorithm 2: of beta1 is the step, of beta2 the memory."""
    config = dataclasses.replace(CONFIG, name="lion", warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(config, STEPS)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=200).astype(np.float32)
    params = {"kernel": jnp.asarray(weight)}
    state, memory = optimizer.init(params), np.zeros(200, np.float32)
    for _ in range(5):
        grad = rng.normal(size=200).astype(np.float32)
        updates, state = optimizer.update({"kernel": jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        step = np.sign(0.8 * memory + 0.2 * grad)
        memory = 0.9 * memory + 0.1 * grad
        weight -= 3e-2 * (step + 0.3 * weight)
        np.testing.assert_allclose(params["kernel"], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0.5, 3.0])
def test_the_whole_gradient_is_clipped(size):
    params = {"a": {"kernel": jnp.zeros(2)}, "b": {"kernel": jnp.zeros(1)}}
    grads = {"a": {"kernel": jnp.array([2.0, -1.0])}, "b": {"kernel": jnp.array([2.0])}}  # norm 3
    grads = jax.tree.map(lambda leaf: leaf * size / 3, grads)
    # With epsilon this large, AdamW's first step is nearly in proportion to the gradient.
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, epsilon=1e6, clip_norm=1.0)
    optimizer = make_optimizer(config, 10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    norm = float(optax.tree.norm(updates)) * 1e6
    assert norm == pytest.approx(min(size, 1.0), rel=1e-4)
    ratio = updates["a"]["kernel"] / -grads["a"]["kernel"]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
