"""decode/scheduler.py: texts of a batch whose rows are refilled, by those of one batch."""

import dataclasses

import jax
import numpy as np
import pytest
from decode_model import CONFIG, MODEL
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.decode import engine, scheduler, state
from neo_jax.decode.options import SamplingOptions, room_for, stack_settings
from neo_jax.decode.requests import Request
from neo_jax.decode.scheduler import Scheduler, complete, in_order
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding

OPTIONS = [
    SamplingOptions(temperature=0.0),
    SamplingOptions(temperature=1.0, top_p=1.0, seed=3),
    SamplingOptions(temperature=0.0, repetition_penalty=1.5),
    SamplingOptions(temperature=1.0, min_p=0.05, no_repeat_ngram_size=2, seed=9),
]


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
    rows = stack_settings([request.options[0] for request in requests])
    prompts = [request.ids for request in requests]
    texts = engine.generate(MODEL, params, prompts, 40, rows)
    return [text.ids[:new] for text, new in zip(texts, NEW, strict=True)]


def texts_of(params, requests, model=MODEL):
    """By a batch of three rows: one number, so that tests share their programs."""
    done = list(in_order(complete(model, params, requests, 3)))
    assert len(done) == len(requests)
    return done


def test_texts_are_those_of_one_plain_batch(params, requests, alone):
    for (text,), expected, request in zip(texts_of(params, requests), alone, requests, strict=True):
        assert text.ids[: len(expected)] == expected
        assert len(text.ids) == len(text.logprobs) == request.max_new_tokens
        assert text.finish_reason == "length"


def test_an_order_changes_no_text(params, requests):
    expected = texts_of(params, requests)
    order = np.random.default_rng(1).permutation(len(requests))
    shuffled = texts_of(params, [requests[i] for i in order])
    for i, (text,) in zip(order, shuffled, strict=True):
        assert text.ids == expected[i][0].ids
        np.testing.assert_allclose(text.logprobs, expected[i][0].logprobs, rtol=0, atol=1e-5)


def test_fifty_prompts_compile_few_programs(params):
    """At most as many as the module says, with 6 lengths of prompts and 4 capacities."""
    run = engine.run.on(Neo(CONFIG))
    programs = {
        engine.prefill: 6, state.insert: 24, run: 4, state.resize: 16, state.empty_state: 4,
    }  # fmt: skip
    for program in programs:
        program.clear_cache()
    lengths = np.random.default_rng(2).permutation(np.arange(1, 151, 3))
    new = np.random.default_rng(3).integers(1, 8, 50)
    assert len(texts_of(params, make_requests(lengths.tolist(), new.tolist()))) == 50
    for program, most in programs.items():
        assert 1 <= program._cache_size() <= most, program


def test_a_prompt_is_read_once_for_all_of_its_samples(params, monkeypatch):
    read = []
    prefill = engine.prefill

    def noting(model, room, params, tokens, lengths, *rest):
        read.extend(lengths.tolist())
        return prefill(model, room, params, tokens, lengths, *rest)

    monkeypatch.setattr(engine, "prefill", noting)
    drawn = [SamplingOptions(temperature=1.0, top_p=1.0, seed=seed) for seed in range(5)]
    prompt = list(range(1, 10))
    samples, one = texts_of(
        params, [Request(prompt, 30, drawn), Request([7] * 12, 30, [OPTIONS[0]])]
    )
    assert [length for length in read if length > 1] == [9, 12]
    assert len({tuple(text.ids) for text in samples}) == 5
    expected = engine.generate(MODEL, params, [prompt] * 5, 30, stack_settings(drawn))
    assert [text.ids for text in samples] == [text.ids for text in expected]
    assert len(one) == 1


def test_a_stop_check_stops_its_text_alone(params, requests):
    expected = texts_of(params, requests[:4])
    seen = []

    def check(ids):
        seen.extend(ids)
        return 11 if len(seen) >= 11 else None

    checked = [dataclasses.replace(requests[0], stop_checks=[check]), *requests[1:4]]
    (first,), *others = texts_of(params, checked)
    assert (first.ids, first.finish_reason) == (expected[0][0].ids[:11], "stop")
    assert first.logprobs == pytest.approx(expected[0][0].logprobs[:11], abs=1e-5)
    assert seen == expected[0][0].ids[: len(seen)]
    assert len(seen) <= 11 + scheduler.CHECKED_STEPS
    assert [text.ids for (text,) in others] == [text.ids for (text,) in expected[1:]]


def test_the_end_of_text_makes_place_for_the_next(params):
    """A row whose text ends waits for no other: all steps but the last ones write three texts."""
    requests = make_requests([9] * 6, [40] * 6)
    whole = [text.ids for (text,) in texts_of(params, requests)]
    eos = (whole[1][5], whole[3][0])
    model = Neo(dataclasses.replace(CONFIG, eos_token_id=eos))
    for (text,), ids in zip(texts_of(params, requests, model=model), whole, strict=True):
        cut = min((ids.index(end) for end in eos if end in ids), default=len(ids))
        assert text.ids == ids[:cut]
        assert text.finish_reason == ("eos" if cut < len(ids) else "length")


def test_a_mesh_changes_no_text(params, requests):
    sharding = make_sharding("data=2,model=2", devices=jax.devices()[:4])
    some = [requests[0], requests[7], requests[10]]
    expected = texts_of(params, some)
    found = texts_of(params, some, model=Neo(CONFIG, sharding=sharding))
    assert [text.ids for (text,) in found] == [text.ids for (text,) in expected]


def test_results_come_in_order_as_early_as_they_can():
    finished = iter([(1, "b"), (0, "a"), (3, "d"), (2, "c")])
    results = in_order(finished)
    assert next(results) == "a"
    assert next(finished) == (3, "d")
    assert list(in_order([(2, "c"), (1, "b"), (0, "a")])) == ["a", "b", "c"]


def test_prompts_are_taken_by_length_within_a_window():
    requests = [Request([1] * length, 1, [OPTIONS[0]]) for length in (5, 2, 9, 1, 3)]
    assert list(scheduler._turns(requests, 3)) == [1, 0, 2, 3, 4]
    assert list(scheduler._turns(requests, 99)) == [3, 1, 4, 0, 2]


def test_no_requests_and_one_that_cannot_be_met(params):
    assert list(complete(MODEL, params, [], 3)) == []
    bad = [Request([1], 5, [OPTIONS[0]]), Request([1] * 158, 5, [OPTIONS[0]])]
    with pytest.raises(NeoError, match="a prompt of 158 tokens and 5 new ones exceed"):
        complete(MODEL, {}, bad, 3)


# Requests that come and go.

ROWS = 3
POOL = make_requests([3, 40, 17, 1, 70, 9], [9, 4, 1, 12, 6, 20], seed=5)
POOL[2] = dataclasses.replace(POOL[2], options=[OPTIONS[1], OPTIONS[3], OPTIONS[0]])
STOPPED = 5  # of these, by a check
KEPT = 7


@pytest.fixture(scope="module")
def each_alone(params):
    """What each request of the pool gets when it is the only one, sample by sample."""
    texts = [
        [
            engine.generate(MODEL, params, [each.ids], each.max_new_tokens, stack_settings([one]))[
                0
            ]
            for one in each.options
        ]
        for each in POOL
    ]
    whole = texts[STOPPED][0]
    texts[STOPPED] = [engine.Completion(whole.ids[:KEPT], whole.logprobs[:KEPT], "stop")]
    return texts


def check_after(count):
    """A stop check that stops a text which has so many tokens, of which it keeps seven."""
    seen = []

    def check(ids):
        seen.extend(ids)
        return KEPT if len(seen) >= count else None

    return check


def submit(scheduler, i, stream):
    checks = [check_after(KEPT + 2)] if i == STOPPED else []
    return scheduler.submit(dataclasses.replace(POOL[i], stop_checks=checks, stream=stream))


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(POOL) - 1)),
    st.tuples(st.just("step"), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 99)),
)


@settings(max_examples=30)
@given(actions=st.lists(actions, min_size=1, max_size=24), stream=st.booleans())
def test_a_request_gets_the_text_that_it_gets_alone(params, each_alone, actions, stream):
    """Greedy and drawn, whatever comes before it, with it or after it, and whatever is dropped."""
    scheduler = Scheduler(MODEL, params, ROWS)
    wanted = {}  # the texts of each request that is there: what events have reported of each
    dropped = []
    actions = [*actions, *[("step", 0)] * 999]
    for action, number in actions:
        if action == "submit":
            texts = {sample: [] for sample in range(len(POOL[number].options))}
            wanted[submit(scheduler, number, stream)] = (number, texts)
        elif action == "cancel" and wanted:
            id = sorted(wanted)[number % len(wanted)]
            scheduler.cancel(id)
            dropped.append(wanted.pop(id))
        elif action == "step":
            assert scheduler.busy == bool(wanted)
            if not wanted:
                break
            there = sum(len(texts) for _, texts in wanted.values())
            events = scheduler.step()
            # A row that is free is taken in the same step, so all rows have a text while there are.
            assert not stream or len(events) == min(ROWS, there)
            for event in events:
                number, texts = wanted[event.request]  # no event of what is finished or dropped
                texts[event.sample] += event.ids
                expected = each_alone[number][event.sample]
                if event.completion is None:
                    continue
                found = event.completion
                assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
                np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=0, atol=1e-5)
                assert texts.pop(event.sample)[: len(found.ids)] == found.ids
                if not texts:
                    del wanted[event.request]
    assert not wanted
    assert not scheduler.busy
    assert scheduler.step() == []
    for number, texts in dropped:
        for sample, ids in texts.items():
            expected = each_alone[number][sample].ids
            assert ids[: len(expected)] == expected[: len(ids)]


def test_a_row_is_free_in_the_step_in_which_its_owner_leaves(params):
    scheduler = Scheduler(MODEL, params, ROWS)
    first, *others, last = [submit(scheduler, i, True) for i in (3, 1, 4, 0)]
    assert [event.request for event in scheduler.step()] == [first, *others]
    scheduler.cancel(others[0])
    assert sorted(event.request for event in scheduler.step()) == sorted([first, others[1], last])
    scheduler.cancel(first)
    scheduler.cancel(99)  # whatever is not there
    assert sorted(event.request for event in scheduler.step()) == sorted([others[1], last])
    assert scheduler._state.done.tolist() == [True, False, False]


def test_a_request_compiles_nothing(params, compilations):
    """Neither its settings nor its bans are part of a program."""
    scheduler = Scheduler(MODEL, params, ROWS)
    with compilations() as counted:
        jax.jit(lambda x: x + 2)(np.ones(3)).block_until_ready()
    assert counted  # the count counts

    def run(options):
        scheduler.submit(Request([5, 6, 7], 4, [options]))
        while scheduler.busy:
            scheduler.step()

    run(OPTIONS[0])
    with compilations() as counted:
        for options in OPTIONS:
            run(dataclasses.replace(options, suppress_tokens=[1, 2], bad_words_ids=[[3, 4]]))
    assert counted == []


def test_a_request_that_bans_more_than_there_is_room_for_is_refused(params):
    many = SamplingOptions(suppress_tokens=range(17))
    with pytest.raises(NeoError, match="a request needs room for 32 bans, not 16"):
        Scheduler(MODEL, params, ROWS).submit(Request([1], 2, [many]))
    request = Request([1], 2, [many])
    scheduler = Scheduler(MODEL, params, ROWS, room_for([many]))
    scheduler.submit(request)
    assert not set(scheduler.step()[0].completion.ids) & set(range(17))


def test_a_prompt_that_is_read_and_waits_for_a_row_can_be_cancelled(params):
    """Its prompt was read with that of the text which has the only row."""
    first, second = make_requests([3, 4], [6, 6], stream=True)
    rows = Scheduler(MODEL, params, rows=2)
    running = rows.submit(dataclasses.replace(first, options=OPTIONS[:2]))
    waiting = rows.submit(second)
    assert {event.request for event in rows.step()} == {running}
    rows.cancel(waiting)
    events = []
    while rows.busy:
        events += rows.step()
    assert {event.request for event in events} == {running}
    assert sum(event.completion is not None for event in events) == 2
