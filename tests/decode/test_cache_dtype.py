"""Decoding through caches of other dtypes: what the model says, and how much memory it takes."""

import json
import lzma
import math
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import neo_jax
from neo_jax.checkpoints.load import cached_dtype
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.decode.sampling import logprobs_of
from neo_jax.model.cache import SLACK, num_bytes, num_slots
from neo_jax.model.transformer import Neo

HELD_OUT = Path(__file__).parents[1] / "corpora" / "held_out.jsonl.xz"
GREEDY = SamplingOptions(temperature=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_cache_is_of_the_dtype_and_takes_what_is_said(checkpoints, dtype):
    lm = neo_jax.load(checkpoints["bytes"], cache_dtype=dtype)
    settings = make_settings(GREEDY, [0, 0])
    room = lm.config.max_length
    prompts = [[5, 6, 7], list(range(40))]
    state = engine.start(lm.model, lm.params, prompts, room - 40, settings)
    state = engine.run(lm.model, lm.params, state, 2)
    for i, layer in enumerate(state.cache):
        assert {leaf.dtype for leaf in jax.tree.leaves((layer.k, layer.v)) if leaf.ndim == 4} == {
            jnp.dtype(dtype)
        }
        slots = num_slots(lm.config, i, room)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(layer))
        assert size == 2 * num_bytes(lm.config, slots, jnp.dtype(dtype))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_cpus_keep_float32_unless_told(checkpoints, platform):
    device = SimpleNamespace(platform=platform)
    assert cached_dtype("auto", device) == (jnp.float32 if platform == "cpu" else None)
    assert cached_dtype("bfloat16", device) == jnp.bfloat16
    lm = neo_jax.load(checkpoints["bytes"], dtype="bfloat16")
    state = engine.start(lm.model, lm.params, [[5, 6]], 2, make_settings(GREEDY, [0]))
    assert state.cache[0].k.dtype == jnp.float32  # these are CPUs


def test_bits_a_byte_through_an_int8_cache():
    """Of the bundled model on a text that it never saw, through the cache, beyond the window."""
    with lzma.open(HELD_OUT, "rt", encoding="utf-8") as file:
        text = json.loads(file.readline())["text"]
    lm = neo_jax.load()
    ids = np.array([lm.encode(text)[: 3 * 16 * (SLACK + 1) + 1]])
    num_bytes = len(lm.tokenizer.decode(ids[0].tolist()).encode())

    def bits(dtype):
        model = Neo(lm.config, cache_dtype=jnp.dtype(dtype))
        return -float(through_cache(model, lm.params, ids)) / math.log(2) / num_bytes

    floats, int8 = bits("float32"), bits("int8")
    assert 1 < floats < 2.5
    assert 0 < abs(int8 / floats - 1) < 0.005


def through_cache(model, params, ids):
    """Returns the sum of log p of all tokens after the first, read 17 at a time."""
    step = SLACK + 1
    settings = make_settings(GREEDY, [0])
    start = engine.start(model, params, [[0]], 1023, settings)

    def read(cache, chunk):
        tokens, targets, positions = chunk
        output = model.apply({"params": params}, tokens, positions, cache)
        return output.cache, logprobs_of(output.logits, targets).sum()

    chunks = ids[:, :-1].reshape(1, -1, step).swapaxes(0, 1)
    targets = ids[:, 1:].reshape(1, -1, step).swapaxes(0, 1)
    positions = np.arange(chunks.size).reshape(-1, 1, step)
    scan = jax.jit(lambda cache, *chunk: jax.lax.scan(read, cache, chunk)[1].sum())
    return scan(start.cache, chunks, targets, positions)


def test_an_unknown_dtype_is_refused(checkpoints):
    with pytest.raises(neo_jax.NeoError, match=r"cache_dtype must be .* or 'int8', not 'int4'"):
        neo_jax.load(checkpoints["bytes"], cache_dtype="int4")
