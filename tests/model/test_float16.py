"""float16, for GPUs without bfloat16: as near to float32 as transformers', and always finite."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from model.test_parity import case, forward, rms

from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, stack_settings
from neo_jax.model.transformer import Neo

GREEDY = SamplingOptions(temperature=0.0)


def in_float16(params):
    return jax.tree.map(lambda x: x.astype(jnp.float16), params)


def logits_of(model, params, tokens, positions=None):
    program = jax.jit(lambda params, *args: model.apply({"params": params}, *args).logits)
    return np.asarray(program(params, tokens, positions))


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["global-local", "wide", "gpt2-untied"])
@pytest.mark.parametrize("kernel", ["dense", "blocked"])
def test_logits_are_nearer_to_the_exact_ones_than_those_of_transformers(name, kernel):
    config, params, theirs = case(name)
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 3 * config.window_size))
    exact = forward(theirs, torch.float64, tokens)[-1]
    reference = forward(copy.deepcopy(theirs), torch.float16, tokens)[-1]
    model = Neo(config, jnp.float16, kernel)
    ours = logits_of(model, in_float16(params), tokens)
    assert ours.dtype == np.float32
    assert rms(ours - exact) <= rms(reference - exact)
    # It is float16 indeed: float32 is a hundred times nearer.
    assert rms(ours - exact) > 20 * rms(logits_of(Neo(config), params, tokens) - exact)


def large(name):
    """Parameters whose activations, queries and keys are far beyond float16's 65504."""
    config, params, _ = case(name)
    leaves = flatten_dict(params)
    for path, leaf in leaves.items():
        if path[-2] in ("c_fc", "q_proj", "k_proj", "v_proj"):
            leaves[path] = leaf * (3e4 / jnp.abs(leaf).max())
    return config, unflatten_dict(leaves)


@pytest.mark.parametrize("name", ["global-local", "gpt2"])
def test_large_activations_stay_finite(name):
    config, params = large(name)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, (3, 50))
    lengths = np.array([50, 1, 17])
    positions = np.where(np.arange(50) < lengths[:, None], np.arange(50), -1)
    tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
    single = Neo(config).apply({"params": params}, tokens, positions)
    assert all(np.abs(layer.k).max() > 65504 for layer in single.cache)
    for kernel in ("dense", "blocked"):
        model = Neo(config, jnp.float16, kernel)
        output = model.apply({"params": in_float16(params)}, tokens, positions)
        for x in jax.tree.leaves(output):
            assert np.isfinite(np.asarray(x, np.float32)).all()

    def loss(params, tokens):
        logprobs = jax.nn.log_softmax(model.apply({"params": params}, tokens).logits[:, :-1])
        return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1).mean()

    for grad in jax.tree.leaves(jax.jit(jax.grad(loss))(params, tokens)):
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("cache_dtype", [None, "float16", "int8"])
def test_padded_rows_and_a_prompt_as_long_as_the_context_are_generated(cache_dtype):
    config, params = large("global-local")
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, size).tolist() for size in (54, 1, 20)]
    model = Neo(config, jnp.float16, cache_dtype=cache_dtype and jnp.dtype(cache_dtype))
    texts = engine.generate(model, in_float16(params), prompts, 10, stack_settings([GREEDY] * 3))
    for prompt, text in zip(prompts, texts, strict=True):
        assert np.isfinite(text.logprobs).all()
        alone = engine.generate(model, in_float16(params), [prompt], 10, stack_settings([GREEDY]))
        assert alone[0].ids == text.ids


def test_float32_activations_enter_a_cache_of_float16():
    config, params = large("global-local")
    model = Neo(config, cache_dtype=jnp.dtype("float16"))
    state = engine.start(model, params, [[1, 2, 3]], 9, stack_settings([GREEDY]))
    state = engine.run(model, params, state, 9)
    of_keys = [np.asarray(x, np.float32) for layer in state.cache for x in (layer.k, layer.v)]
    assert all(np.isfinite(x).all() for x in of_keys)
    assert max(np.abs(x).max() for x in of_keys) == 65504


@pytest.mark.optimized
def test_greedy_texts_are_those_of_float32_where_the_first_choice_is_clear():
    config, params, _ = case("wide")
    model = functools.partial(Neo, config)
    prompt = [[5, 3, 9, 11]]
    single = engine.generate(model(), params, prompt, 8, stack_settings([GREEDY]))
    half = engine.generate(
        model(jnp.float16), in_float16(params), prompt, 8, stack_settings([GREEDY])
    )
    assert half[0].ids == single[0].ids
