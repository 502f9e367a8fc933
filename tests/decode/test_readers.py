"""decode/readers.py: prompts that are read by chunks, next to those that are read whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decode_model import CONFIG, MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.decode import engine, prefill, state
from neo_jax.decode.options import ROOM, SamplingOptions, stack_settings
from neo_jax.decode.requests import Event, PromptRead, Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.text.score import score_ids

CHUNK = 32
ALTERNATIVES = ROOM._replace(alternatives=4)
OPTIONS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=1.0, top_p=1.0, seed=3),
    SamplingOptions(temperature=0.0, frequency_penalty=0.7, presence_penalty=0.3),
    SamplingOptions(temperature=1.0, min_p=0.05, seed=9),
]


def prompt_of(length):
    return np.random.default_rng(length).integers(1, CONFIG.vocab_size, length).tolist()


LENGTHS = [1, 3, 20, 31, 32, 33, 64, 65, 100, 130]  # CONFIG's window is far shorter than the last


def drain(scheduler):
    events = []
    while scheduler.busy:
        events += scheduler.step()
    return events


def whole(params, ids, new, options):
    return engine.generate(MODEL, params, [ids], new, stack_settings([options]))[0].ids


@pytest.mark.parametrize("model", [MODEL, Neo(CONFIG, sharding=make_sharding("data=2,model=2"))])
def test_texts_are_those_of_prompts_that_are_read_whole(params, model):
    scheduler = Scheduler(model, params, 4, ALTERNATIVES, CHUNK)
    requests = {}
    for i, length in enumerate(LENGTHS * 2):
        request = Request(prompt_of(length), 12, [OPTIONS[i % 4]], stream=True)
        requests[scheduler.submit(request)] = request
        if i % 3 == 0:
            scheduler.step()  # they arrive while others are read and written
    done = {}
    for event in drain(scheduler):
        if isinstance(event, Event) and event.completion:
            done[event.request] = event.completion.ids
    for id, request in requests.items():
        if id in done:  # some were finished by the steps above
            expected = whole(params, request.ids, 12, request.options[0])
            assert done[id] == expected, len(request.ids)
    assert len(done) >= 15


@jax.jit
def read_whole(params, tokens):
    """The four likeliest tokens after each, their log p, and hidden states."""
    logits, _, hidden = MODEL.apply({"params": params}, tokens)
    return *jax.lax.top_k(jax.nn.log_softmax(logits), 4), hidden[-1]


def test_what_a_prompt_says_of_itself(params):
    """Its tokens' log p are those of scoring, its mean that of the hidden states."""
    scheduler = Scheduler(MODEL, params, 4, ALTERNATIVES, CHUNK)
    wants = {"prompt_logprobs": True, "prompt_pool": "mean"}
    ids = {scheduler.submit(Request(prompt_of(n), 0, [], **wants)): n for n in LENGTHS}
    plain = scheduler.submit(Request(prompt_of(5), 2, [OPTIONS[0]]))
    events = drain(scheduler)
    found = {event.request: event for event in events if isinstance(event, PromptRead)}
    assert found.keys() == {*ids, plain}
    assert found[plain][1:] == (None,) * 4
    expected = score_ids(MODEL, params, [prompt_of(n) for n in LENGTHS])
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)  # of padding nothing is looked at
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = prompt_of(length)
    likeliest, order, hidden = map(np.asarray, read_whole(params, tokens))
    for row, ((id, length), logprobs) in enumerate(zip(ids.items(), expected, strict=True)):
        event, before = found[id], (row, slice(length - 1))
        mean = hidden[row, :length].mean(axis=0)
        np.testing.assert_allclose(event.pooled, mean, rtol=0, atol=1e-5)
        np.testing.assert_allclose(event.logprobs, logprobs, rtol=0, atol=2e-5)
        assert len(event.ids) == length - 1
        if length == 1:
            continue
        np.testing.assert_array_equal(event.ids, order[before])
        np.testing.assert_allclose(event.likeliest, likeliest[before], rtol=0, atol=2e-5)


def test_running_texts_wait_for_one_chunk(params, monkeypatch):
    """While a long prompt is read, every step writes a token of the text that runs."""
    scheduler = Scheduler(MODEL, params, 2, ROOM, CHUNK)
    running = scheduler.submit(Request(prompt_of(4), 20, [OPTIONS[0]], stream=True))
    scheduler.step()
    reads = []
    for name in ("first_chunk", "next_chunk"):
        program = getattr(prefill, name)
        monkeypatch.setattr(
            prefill, name, lambda *args, p=program: reads.append(args[2].shape) or p(*args)
        )
    late = scheduler.submit(Request(prompt_of(130), 5, [OPTIONS[0]], stream=True))
    for count in range(1, 5):
        events = scheduler.step()
        assert [event.request for event in events] == [running]
        assert reads == [(1, CHUNK)] * count
    assert {event.request for event in scheduler.step()} == {running, late}
    assert len(reads) == 5


@pytest.mark.parametrize("length", [5, 100])
def test_a_prompt_that_is_being_read_can_be_cancelled(params, length):
    scheduler = Scheduler(MODEL, params, 2, ROOM, CHUNK)
    first = scheduler.submit(Request(prompt_of(100), 4, [OPTIONS[0]]))
    second = scheduler.submit(Request(prompt_of(length), 4, [OPTIONS[0]]))
    scheduler.step()
    scheduler.cancel(first)
    events = drain(scheduler)
    assert {event.request for event in events} == {second}
    expected = whole(params, prompt_of(length), 4, OPTIONS[0])
    assert events[-1].completion.ids == expected


def test_short_prompts_are_read_together_where_many_wait(params, monkeypatch):
    shapes = []
    program = prefill.first_chunk
    monkeypatch.setattr(
        prefill, "first_chunk", lambda *args: shapes.append(args[2].shape) or program(*args)
    )
    scheduler = Scheduler(MODEL, params, 4, ROOM, CHUNK)
    for count in (1, 2, 4, 3):
        for _ in range(count):
            scheduler.submit(Request(prompt_of(6), 1, [OPTIONS[0]]))
        drain(scheduler)
    # No more than a chunk of 32 tokens.
    assert shapes == [(1, 16), (2, 16), (2, 16), (2, 16), (2, 16), (1, 16)]


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 140), min_size=1, max_size=5),
    chunk=st.sampled_from([16, 32, 64, 1000]),
    seed=st.integers(0, 99),
)
def test_any_chunk_gives_the_same_texts(params, lengths, chunk, seed):
    scheduler = Scheduler(MODEL, params, 3, ALTERNATIVES, chunk)
    options = dataclasses.replace(OPTIONS[1], seed=seed)
    requests = [Request(prompt_of(n), 5, [options]) for n in lengths]
    ids = [scheduler.submit(request) for request in requests]
    done = {e.request: e.completion.ids for e in drain(scheduler) if isinstance(e, Event)}
    for id, request in zip(ids, requests, strict=True):
        assert done[id] == whole(params, request.ids, 5, options)


def test_alternatives_are_the_likeliest_tokens_of_each_step(params):
    """Of rows that want different numbers of them, over more steps than are kept."""
    scheduler = Scheduler(MODEL, params, 3, ALTERNATIVES, CHUNK)
    counts = {}
    for want, options in ((4, OPTIONS[0]), (2, OPTIONS[1]), (0, OPTIONS[0])):
        request = Request(prompt_of(7), 21, [options], stream=True, num_alternatives=want)
        counts[scheduler.submit(request)] = want
    seen = {id: [] for id in counts}
    for event in drain(scheduler):
        if isinstance(event, Event):
            pairs = event.alternatives or [None] * len(event.ids)
            seen[event.request] += zip(event.ids, event.logprobs, pairs, strict=True)
    for id, want in counts.items():
        ids = prompt_of(7) + [token for token, *_ in seen[id]]
        assert len(ids) == 28
        hidden, _ = MODEL.apply({"params": params}, jnp.array([ids]), method=Neo.hidden)
        logits = MODEL.apply({"params": params}, hidden[:, 6:-1], method=Neo.unembed)
        logprobs = np.asarray(jax.nn.log_softmax(logits[0]))
        for row, (token, logprob, pairs) in zip(logprobs, seen[id], strict=True):
            assert abs(row[token] - logprob) < 1e-4
            if not want:
                assert pairs is None
                continue
            assert [token for token, _ in pairs] == np.argsort(-row)[:want].tolist()
            assert np.allclose([p for _, p in pairs], -np.sort(-row)[:want], atol=1e-4)


def test_no_setting_compiles_and_lengths_compile_few_programs(params):
    """Two lengths up to a chunk, the shorter also by two rows, one longer; four capacities."""
    programs = {
        prefill.first_chunk: 4, prefill.next_chunk: 2, prefill.judge: 5, state.insert_read: 32,
        state.resize: 24, state.empty_state: 8, engine.run.on(MODEL): 8, state.take_rows: 8,
    }  # fmt: skip
    for program in programs:
        program.clear_cache()
    scheduler = Scheduler(MODEL, params, 4, ALTERNATIVES, CHUNK)
    rng = np.random.default_rng(5)
    for i, length in enumerate(rng.integers(1, 150, 60).tolist()):
        wanted = {"prompt_logprobs": i % 2 == 0, "num_alternatives": i % 5}
        options = [OPTIONS[i % 4]] * (i % 3)
        scheduler.submit(Request(prompt_of(length), 3 * bool(options), options, **wanted))
        if i % 7 == 0:
            drain(scheduler)
    drain(scheduler)
    for program, most in programs.items():
        assert program._cache_size() <= most, (program, program._cache_size())
    assert engine.run.on(MODEL)._cache_size() >= 4
