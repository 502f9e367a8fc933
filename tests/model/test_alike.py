"""model/alike.py: layers are traced once, and nothing else is another."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from neo_jax.model import alike
from neo_jax.model.transformer import MLP, Attention, Neo, init_params


@pytest.fixture(scope="module")
def model(tiny_config):
    return Neo(dataclasses.replace(tiny_config, num_layers=6))


@pytest.fixture(scope="module")
def params(model):
    return jax.jit(lambda key: init_params(model, key))(jax.random.key(1))


def programs(model, params, monkeypatch, call):
    """The lowered forward pass by a way of calling layers, and how often attention was traced."""
    traced = []
    true = Attention.__call__
    monkeypatch.setattr(Attention, "__call__", lambda *args: traced.append(1) or true(*args))
    monkeypatch.setattr(alike, "call", call)
    jax.clear_caches()
    tokens = jnp.zeros((2, 9), jnp.int32)
    lowered = jax.jit(lambda params: model.apply({"params": params}, tokens).logits).lower(params)
    return lowered, len(traced)


def test_the_program_is_that_of_layers_one_by_one(model, params, monkeypatch):
    """Six layers of two kinds are traced twice; XLA is given the same operations."""
    with monkeypatch.context() as patch:
        ours, few = programs(model, params, patch, alike.call)
    with monkeypatch.context() as patch:
        plain, all_ = programs(model, params, patch, lambda layer, *args: layer(*args))
    assert (few, all_) == (2, 6)
    assert ours.as_text() == plain.as_text()
    names = ours.as_text(debug_info=True)
    assert all(f"h_{i}/" in names for i in range(6))


def test_dropout_is_that_of_layers_one_by_one(model, params, monkeypatch):
    tokens = jnp.arange(12).reshape(2, 6)

    def logits():
        key = {"dropout": jax.random.key(0)}
        dropping = model.clone(dropout=0.5)
        return dropping.apply({"params": params}, tokens, rngs=key).logits

    ours = logits()
    monkeypatch.setattr(alike, "call", lambda layer, *args: layer(*args))
    np.testing.assert_array_equal(ours, logits())


def test_intermediates_are_captured_in_every_layer(model, params):
    """By flax's own way to look at them."""
    tokens = jnp.arange(12).reshape(2, 6)
    out, found = model.apply({"params": params}, tokens, capture_intermediates=True)
    assert {f"h_{i}" for i in range(6)} < set(found["intermediates"])
    np.testing.assert_array_equal(
        found["intermediates"]["h_0"]["__call__"][0][0], out.hidden_states[1]
    )


@pytest.mark.core
def test_methods_are_intercepted_in_every_layer_and_then_no_more(model, params):
    """Also where the layers have been traced before."""
    tokens = jnp.arange(12).reshape(2, 6)
    expected = model.apply({"params": params}, tokens).logits
    seen = []

    def without_mlp(next_fun, args, kwargs, context):
        if isinstance(context.module, MLP) and context.method_name == "__call__":
            seen.append(context.module.path[0])
            return 0 * next_fun(*args, **kwargs)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(without_mlp):
        changed = model.apply({"params": params}, tokens).logits
    assert seen == [f"h_{i}" for i in range(6)]
    assert not np.allclose(changed, expected)
    np.testing.assert_array_equal(model.apply({"params": params}, tokens).logits, expected)
