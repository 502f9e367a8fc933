"""training/objectives/streamed.py: preferences over pairs, as an objective and written plainly."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neo_jax.config import ModelConfig
from neo_jax.model.scan import embed, hidden, stack, unstack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import tuning
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives import Sums
from neo_jax.training.objectives.streamed import token_logprobs
from neo_jax.training.step import abstract_inputs, init_state, make_step, state_of
from neo_jax.transforms.lora import LoraConfig, add_adapters, merge

CONFIG = TrainConfig(
    data="",
    output="",
    steps=10,
    batch_size=8,
    model=ModelConfig(
        num_layers=2, embed_dim=32, num_heads=2, vocab_size=96, max_length=32, window_size=8
    ),
    dtype="float32",
)
BETA = 0.02


class Pairs(NamedTuple):
    """A text that was chosen and one that was rejected."""

    tokens: Any  # int32 [B, 2, T + 1]
    weights: Any  # float32 [B, 2, T]


@dataclasses.dataclass(frozen=True)
class Preference:
    """-log sigmoid(beta (log p(chosen) - log p(rejected)) - margin), the margin learned."""

    beta: float

    def init(self, model, key):
        return {"margin": {"bias": 0.1 + 0.01 * jax.random.normal(key, ())}}

    def batch_spec(self, rows, length, has_segment_starts):
        return Pairs(
            jax.ShapeDtypeStruct((rows, 2, length + 1), jnp.int32),
            jax.ShapeDtypeStruct((rows, 2, length), jnp.float32),
        )

    def embed(self, model, params, batch, key=None):
        x = embed(model, params, texts(batch.tokens)[:, :-1], key=key)
        return x.reshape(len(batch.tokens), 2, *x.shape[1:])  # leads with the rows of the batch

    def loss(self, model, params, batch, *, embedded=None, **options):
        if embedded is None:
            embedded = self.embed(model, params, batch)
        x = hidden(model, params, texts(embedded), **options)
        table = params[model.config.unembedding]["embedding"]
        logprobs = token_logprobs(model, table, x, texts(batch.tokens)[:, 1:])
        return preference(params, logprobs.reshape(batch.weights.shape), batch, self.beta)

    def evaluate(self, model, params, batch):
        return self.loss(model, params, batch)


def texts(pairs):
    return pairs.reshape(-1, *pairs.shape[2:])


def preference(params, logprobs, batch, beta):
    chosen, rejected = jnp.moveaxis(jnp.sum(logprobs * batch.weights, axis=-1), 1, 0)
    loss = -jnp.sum(jax.nn.log_sigmoid(beta * (chosen - rejected) - params["margin"]["bias"]))
    return Sums(loss, loss, jnp.float32(len(chosen)))


def plain(params, batch):
    """The mean loss with all logits at once."""
    model = Neo(CONFIG.model)
    tokens = texts(batch.tokens)
    canonical = unstack(params, CONFIG.model)
    logits = model.apply({"params": canonical}, tokens[:, :-1]).logits
    logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    sums = preference(params, logprobs.reshape(batch.weights.shape), batch, BETA)
    return sums.objective / sums.weight


@pytest.fixture
def batch(rng):
    lengths = rng.integers(1, 33, (8, 2, 1))
    weights = (np.arange(32) < lengths).astype(np.float32)
    return Pairs(jnp.asarray(rng.integers(0, 96, (8, 2, 33), np.int32)), jnp.asarray(weights))


@pytest.fixture(scope="module")
def params():
    draw = jax.jit(functools.partial(init_params, Neo(CONFIG.model)))
    drawn = stack(draw(jax.random.key(0)), CONFIG.model)
    return drawn | Preference(BETA).init(None, jax.random.key(1))


def one_step(config, params, batch, frozen=None):
    """The reported loss and the gradients of a step: all that this optimizer keeps is the last."""
    model = Neo(config.model, sharding=make_sharding(config.mesh))
    optimizer, objective = optax.trace(decay=0.0), Preference(BETA)
    state = state_of(jax.tree.map(jnp.copy, params), optimizer)
    abstract = init_state_places(model, optimizer, config, objective)
    state = jax.device_put(state, abstract)
    places, _ = abstract_inputs(config, model, objective=objective)
    if model.sharding:
        batch = jax.device_put(batch, jax.tree.map(lambda leaf: leaf.sharding, places))
    step = make_step(model, optimizer, config, objective)
    state, metrics = step(state, batch, *([frozen] if frozen else []))
    return float(metrics["loss"]), state.opt_state.trace


def init_state_places(model, optimizer, config, objective):
    state = init_state(model, optimizer, 0, config.lora, objective)
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def assert_close(found, expected, tolerance=1e-5):
    (loss, grads), (expected_loss, expected_grads) = found, expected
    assert loss == pytest.approx(float(expected_loss), rel=tolerance)
    for path, theirs in jax.tree.leaves_with_path(expected_grads):
        ours = functools.reduce(lambda tree, key: tree[key.key], path, grads)
        error = np.linalg.norm(np.asarray(ours) - np.asarray(theirs))
        assert error <= tolerance * np.linalg.norm(theirs), jax.tree_util.keystr(path)


@pytest.mark.parametrize("mesh", ["", "fsdp=4", "data=2,fsdp=2,model=2"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_preferences_are_an_objective(params, batch, monkeypatch, mesh, accumulation):
    """In blocks that do not divide the length, on devices that share batch and table, in parts."""
    monkeypatch.setattr(tuning, "LOSS_TOKENS", 28)
    config = dataclasses.replace(CONFIG, mesh=mesh, accumulation=accumulation)
    expected = jax.jit(jax.value_and_grad(plain))(params, batch)
    assert 0.1 < abs(float(expected[1]["margin"]["bias"])) < 0.9  # the sigmoids are not all alike
    assert_close(one_step(config, params, batch), expected)


def test_adapters_learn_preferences_too(params, batch):
    lora = LoraConfig(rank=2, alpha=8.0)
    config = dataclasses.replace(CONFIG, mesh="fsdp=4", accumulation=2, lora=lora)
    model = Neo(config.model)
    drawn = init_state(model, optax.identity(), 0, lora, Preference(BETA)).params
    adapters = jax.tree.map(lambda leaf: leaf + 0.01, drawn)  # some are zeros at first
    frozen = {name: tree for name, tree in params.items() if name != "margin"}

    def adapted(adapters, batch):
        of_model = {name: tree for name, tree in adapters.items() if name in frozen}
        merged = merge(add_adapters(frozen, of_model, lora.scale))
        return plain(merged | {"margin": adapters["margin"]}, batch)

    expected = jax.jit(jax.value_and_grad(adapted))(adapters, batch)
    assert_close(one_step(config, adapters, batch, frozen), expected)


@pytest.mark.parametrize("block_tokens", [1, 14, 1024])
def test_any_function_of_log_probabilities_has_its_gradient(rng, monkeypatch, block_tokens):
    monkeypatch.setattr(tuning, "LOSS_TOKENS", block_tokens)
    model, targets = Neo(CONFIG.model), jnp.asarray(rng.integers(0, 96, (2, 9), np.int32))
    table = jnp.asarray(rng.normal(size=(128, 32)).astype(np.float32))
    hidden, cotangent = (
        jnp.asarray(rng.normal(size=shape).astype(np.float32)) for shape in ((2, 9, 32), (2, 9))
    )

    def whole(table, hidden):
        logprobs = jax.nn.log_softmax(hidden @ table[:96].T)
        return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]

    found, pull = jax.vjp(lambda *x: token_logprobs(model, *x, targets), table, hidden)
    expected, theirs = jax.vjp(whole, table, hidden)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    for a, b in zip(pull(cotangent), theirs(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def test_all_logits_never_exist_in_the_backward_pass_either():
    config = dataclasses.replace(CONFIG.model, vocab_size=50_000, max_length=4096)
    shapes = [jax.ShapeDtypeStruct(shape, "f4") for shape in ((50_048, 32), (1, 4096, 32))]
    targets = jax.ShapeDtypeStruct((1, 4096), "i4")

    def loss(table, hidden, targets):
        return jnp.sum(token_logprobs(Neo(config), table, hidden, targets) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes, targets).compile().as_text()
    assert "[1,512,50048]" in text or "[512,50048]" in text
    assert "4096,50048]" not in text
