"""decode/prefixes.py: prompts that begin as others did give the texts that they give alone."""

import numpy as np
import pytest
from decode_model import CONFIG, MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.decode import engine, prefill
from neo_jax.decode.options import ROOM, SamplingOptions, stack_settings
from neo_jax.decode.prefixes import PrefixCache
from neo_jax.decode.requests import Event, Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding

CHUNK = 32
DRAWN = SamplingOptions(temperature=1.0, top_p=1.0, seed=3)


def ids_of(length, seed):
    return np.random.default_rng(seed).integers(1, CONFIG.vocab_size, length).tolist()


@pytest.fixture
def reads(monkeypatch):
    """Positions from which chunks are read."""
    found = []
    first, following = prefill.first_chunk, prefill.next_chunk
    monkeypatch.setattr(prefill, "first_chunk", lambda *args: found.append(0) or first(*args))
    monkeypatch.setattr(
        prefill, "next_chunk", lambda *args: found.append(int(args[3])) or following(*args)
    )
    return found


def texts_of(scheduler, *prompts, **fields):
    ids = [scheduler.submit(Request(prompt, 6, [DRAWN], **fields)) for prompt in prompts]
    done = {}
    while scheduler.busy:
        for event in scheduler.step():
            if isinstance(event, Event) and event.completion:
                done[event.request] = event.completion.ids
    return [done[id] for id in ids]


def alone(params, prompt):
    return engine.generate(MODEL, params, [prompt], 6, stack_settings([DRAWN]))[0].ids


@pytest.mark.parametrize("model", [MODEL, Neo(CONFIG, sharding=make_sharding("model=2"))])
def test_what_is_known_is_not_read_again(params, reads, model):
    scheduler = Scheduler(model, params, 2, ROOM, CHUNK, prefix_bytes=10**9)
    shared = ids_of(100, 0)
    prompts = [
        shared,
        [*shared, *ids_of(20, 1)],  # three chunks are shared
        [*shared[:70], *ids_of(60, 2)],  # two
        [*shared[:92], *ids_of(60, 4)],  # two, and three pieces
        ids_of(100, 3),
        shared[:96],  # its last token must be read, and so its last piece
        shared[:64],
        shared[:20],  # no longer than a chunk
    ]
    expected = [
        [0, 32, 64, 96], [96], [64, 96, 128], [88, 120], [0, 32, 64, 96], [88], [56], [0],
    ]  # fmt: skip
    for prompt, starts in zip(prompts, expected, strict=True):
        reads.clear()
        assert texts_of(scheduler, prompt) == [alone(params, prompt)]
        assert reads == starts
    prefixes = scheduler.prefixes
    assert prefixes.hit == 96 + 64 + 88 + 88 + 56
    assert prefixes.queried == sum(map(len, prompts[:-1]))
    assert len(prefixes._nodes) == (96 + 16 + 64 + 56 + 96) // 8


def test_what_is_left_is_read_as_one_piece_where_it_fits(params, monkeypatch):
    sizes = []
    following = prefill.next_chunk
    monkeypatch.setattr(
        prefill, "next_chunk", lambda *args: sizes.append(args[2].shape[1]) or following(*args)
    )
    scheduler = Scheduler(MODEL, params, 2, ROOM, CHUNK)
    for length, expected in [(64, [32]), (65, [32, 8]), (72, [32, 8]), (73, [32, 32])]:
        sizes.clear()
        prompt = ids_of(length, length)
        assert texts_of(scheduler, prompt) == [alone(params, prompt)]
        assert sizes == expected


def test_what_a_prompt_says_of_itself_needs_all_of_it(params, reads):
    scheduler = Scheduler(MODEL, params, 2, ROOM, CHUNK, prefix_bytes=10**9)
    texts_of(scheduler, ids_of(100, 0))
    reads.clear()
    texts_of(scheduler, ids_of(100, 0), prompt_logprobs=True)
    assert reads == [0, 32, 64, 96]


def test_nothing_is_kept_without_room(params, reads):
    scheduler = Scheduler(MODEL, params, 2, ROOM, CHUNK)
    for _ in range(2):
        texts_of(scheduler, ids_of(100, 0))
    assert reads == [0, 32, 64, 96] * 2
    assert not scheduler.prefixes._nodes


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 12)), max_size=40),
    st.integers(0, 9),
)
@settings(max_examples=60)
def test_room_is_kept_and_no_chunk_without_its_parents(prompts, most):
    """Against a plain list of names in the order of their last use."""
    size = 4 * 8
    cache, names = PrefixCache(2, most * size), []
    for first, second, length in prompts:
        ids = ([first] * 4 + [second] * 20)[:length]
        path = cache.path(ids)
        assert len(path) == (length - 1) // 2
        found = cache.find(ids)
        known = [path[: i + 1] for i in range(len(path)) if path[: i + 1] in names]
        assert len(found) == len(known)
        for name in reversed(known):
            names.remove(name)
            names.append(name)
        for end in range(len(found) + 1, len(path) + 1):
            cache.add(path[:end], (np.zeros(size // 8),))
            parents = [path[:i] for i in range(1, end)]
            if all(name in names for name in parents):
                names.append(path[:end])
                for name in reversed(parents):
                    names.remove(name)
                    names.append(name)
            del names[: max(len(names) - most, 0)]
        assert list(cache._nodes) == names
        assert cache.num_bytes == len(names) * size <= most * size
        assert all(name[:i] in names for name in names for i in range(1, len(name)))
