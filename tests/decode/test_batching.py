"""neo_jax/decode/batching.py: texts of a batch whose rows are refilled, by those of one batch."""

import jax
import numpy as np
import pytest

from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.batching import Request, complete, in_order
from neo_jax.decode.sampling import SamplingOptions, stack_settings
from neo_jax.model import Neo, init_params

CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    vocab_size=128,
    max_length=160,
    window_size=16,
    eos_token_id=-1,
)
MODEL = Neo(CONFIG)
OPTIONS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=1.0, top_p=1.0, seed=3),
    SamplingOptions(temperature=0.0, repetition_penalty=1.5),
    SamplingOptions(temperature=1.0, min_p=0.05, no_repeat_ngram_size=2, seed=9),
]


@pytest.fixture(scope="module")
def params():
    drawn = jax.jit(lambda key: init_params(MODEL, key))(jax.random.key(2))
    scales = {"kernel": 2, "wpe": 8}
    return jax.tree.map_with_path(
        lambda path, leaf: scales.get(path[0].key, scales.get(path[-1].key, 1)) * leaf, drawn
    )


def make_requests(lengths, new, seed=0, **fields):
    """Prompts of these lengths, with as many new tokens, and options in turn."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            rng.integers(1, CONFIG.vocab_size, length).tolist(),
            count,
            [OPTIONS[i % len(OPTIONS)]],
            **fields,
        )
        for i, (length, count) in enumerate(zip(lengths, new, strict=True))
    ]


LENGTHS = [3, 90, 17, 16, 1, 40, 33, 5, 120, 64, 2]
NEW = [30, 5, 1, 60, 12, 100, 3, 59, 40, 2, 7]


@pytest.fixture(scope="module")
def requests():
    return make_requests(LENGTHS, NEW)


@pytest.fixture(scope="module")
def alone(params, requests):
    """What one plain batch gives for them, cut to what each asked for."""
    settings = stack_settings([request.options[0] for request in requests])
    prompts = [request.ids for request in requests]
    texts = engine.generate(MODEL, params, prompts, 40, settings)
    return [text.ids[:new] for text, new in zip(texts, NEW, strict=True)]


def texts_of(params, requests, rows, model=MODEL):
    done = list(in_order(complete(model, params, requests, rows)))
    assert len(done) == len(requests)
    return done


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_texts_are_those_of_one_plain_batch(params, requests, alone, rows):
    for (text,), expected, request in zip(
        texts_of(params, requests, rows), alone, requests, strict=True
    ):
        assert text.ids[: len(expected)] == expected
        assert len(text.ids) == len(text.logprobs) == request.max_new_tokens
        assert text.finish_reason == "length"


def test_an_order_changes_no_text(params, requests):
    expected = texts_of(params, requests, 3)
    order = np.random.default_rng(1).permutation(len(requests))
    shuffled = texts_of(params, [requests[i] for i in order], 4)
    for i, (text,) in zip(order, shuffled, strict=True):
        assert text.ids == expected[i][0].ids
        np.testing.assert_allclose(text.logprobs, expected[i][0].logprobs, rtol=0, atol=1e-5)
