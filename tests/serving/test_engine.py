"""serving/engine.py: many clients at a time get what each would get alone."""

import asyncio
import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest

import neo_jax
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.serving.engine import Engine, make_scheduler
from neo_jax.serving.jobs import Busy, Delta, Job, PromptFound
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.service import Service
from neo_jax.text.language_model import LanguageModel

PROMPTS = ["The people", "Once upon a time there was a king", "It was", "The law of the land " * 30]
DRAWN = SamplingOptions(temperature=0.9, top_p=0.95, seed=5)


@pytest.fixture(scope="module")
def lm():
    return neo_jax.load()


@pytest.fixture
def metrics():
    return Metrics("neo")


@contextlib.contextmanager
def started(lm, metrics, max_sequences=4, prefix_bytes=0, **options):
    scheduler = make_scheduler(lm, max_sequences, prefix_bytes=prefix_bytes)
    engine = Engine(lm, scheduler, metrics, **options)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def engine(lm, metrics):
    with started(lm, metrics) as engine:
        yield engine


def job_of(lm, prompt, new=12, options=(DRAWN,), **fields):
    return Job(lm.prompt_ids(prompt), new, list(options), **fields)


async def collect(engine, *jobs):
    """Texts and finish reasons by job and sample, and all items."""
    texts, reasons, items = {}, {}, []
    async with contextlib.aclosing(engine.run(jobs)) as found:
        async for index, item in found:
            items.append((index, item))
            if isinstance(item, Delta):
                key = (index, item.sample)
                assert key not in reasons
                texts[key] = texts.get(key, "") + item.text
                if item.finish_reason:
                    reasons[key] = item.finish_reason
    return texts, reasons, items


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_texts_are_those_of_generate_whoever_else_is_there(lm, engine):
    variants = [
        {},
        {"temperature": 0.0},
        {"frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"repetition_penalty": 1.3, "min_p": 0.02, "top_k": 40},
        {"logit_bias": {11: 4.0, 12: -100.0}},
        {"no_repeat_ngram_size": 2, "ignore_eos": True, "seed": 2**32 - 1},
    ]
    jobs, expected = [], []
    for i in range(18):
        fields = dataclasses.asdict(DRAWN) | variants[i % len(variants)] | {"seed": i}
        stop = ("the", "of") if i % 3 == 0 else ()
        new, prompt = 5 + 3 * (i % 7), PROMPTS[i % len(PROMPTS)]
        jobs.append(job_of(lm, prompt, new, [SamplingOptions(**fields)], stop=stop))
        expected.append(lm.generate(prompt, new, stop=stop, **fields))

    async def all_at_once():
        return await asyncio.gather(*(collect(engine, job) for job in jobs))

    for (texts, reasons, items), text, job in zip(
        asyncio.run(all_at_once()), expected, jobs, strict=True
    ):
        assert texts[0, 0] == text
        tokens = [token for _, item in items for token in item.tokens]
        assert reasons[0, 0] == (
            "stop" if job.stop and len(tokens) < job.max_new_tokens else "length"
        )
        assert all(token.logprob < 0 for token in tokens)


def test_samples_of_several_jobs(lm, engine):
    options = [dataclasses.replace(DRAWN, seed=5 + i) for i in range(3)]
    texts, reasons, _ = asyncio.run(
        collect(engine, *(job_of(lm, prompt, 9, options) for prompt in PROMPTS[:2]))
    )
    for index, prompt in enumerate(PROMPTS[:2]):
        expected = lm.generate(prompt, 9, num_samples=3, temperature=0.9, top_p=0.95, seed=5)
        assert [texts[index, sample] for sample in range(3)] == expected
    assert set(reasons.values()) == {"length"}


def test_a_stop_id_ends_a_text_before_it(lm, engine):
    greedy = SamplingOptions(temperature=0.0)
    ids = lm.sample([PROMPTS[0]], 12, sampling=greedy)[0].ids
    stop = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    job = job_of(lm, PROMPTS[0], 12, [greedy], stop_token_ids=(ids[stop],))
    texts, reasons, _ = asyncio.run(collect(engine, job))
    assert reasons[0, 0] == "stop"
    assert lm.generate(PROMPTS[0], stop, temperature=0) == texts[0, 0]


def test_alternatives_and_what_a_prompt_says_of_itself(lm, engine):
    job = job_of(lm, PROMPTS[1], 4, num_alternatives=3, prompt_alternatives=2, pool="mean")
    only = Job(job.ids, prompt_alternatives=0)
    _, _, items = asyncio.run(collect(engine, job, only))
    found = {index: item for index, item in items if isinstance(item, PromptFound)}
    expected = lm.score([PROMPTS[1]])[0].logprobs
    for index, count in ((0, 2), (1, 0)):
        first, *rest = found[index].tokens
        assert (first.id, first.logprob) == (job.ids[0], None)
        assert [token.id for token in rest] == job.ids[1:]
        assert {len(token.alternatives) for token in rest} == {count}
        np.testing.assert_allclose([token.logprob for token in rest], expected, atol=2e-5)
    np.testing.assert_allclose(found[0].pooled, lm.embed(PROMPTS[1]).mean(axis=0), atol=1e-5)
    assert found[1].pooled is None
    tokens = [token for index, item in items if isinstance(item, Delta) for token in item.tokens]
    assert len(tokens) == 4
    for token in tokens:
        assert len(token.alternatives) == 3
        assert token.logprob <= token.alternatives[0][1]


def test_a_client_that_leaves_frees_its_row_in_the_next_step(lm, engine):
    async def leave():
        job = job_of(lm, PROMPTS[0], 900)
        async with contextlib.aclosing(engine.run([job])) as found:
            async for _ in found:
                assert engine.num_running == 1
                break

    asyncio.run(leave())
    steps = []
    step = engine._scheduler.step
    engine._scheduler.step = lambda: steps.append(1) or step()
    until(lambda: engine.num_running == 0)
    time.sleep(0.1)
    assert len(steps) <= 2
    assert not engine._open


def test_a_client_may_leave_before_anything_happened(lm, metrics):
    with started(lm, metrics, max_sequences=1) as engine:

        async def leave():
            jobs = [job_of(lm, prompt, 700) for prompt in PROMPTS[:3]]
            tasks = [asyncio.create_task(collect(engine, job)) for job in jobs]
            while engine.num_running == 0:
                await asyncio.sleep(0.01)
            assert engine.num_waiting >= 1
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(leave())
        until(lambda: not engine._open and engine.num_running == engine.num_waiting == 0)
        assert asyncio.run(collect(engine, job_of(lm, PROMPTS[0], 3)))[1] == {(0, 0): "length"}


@pytest.mark.parametrize(
    "limits", [{"max_queued_requests": 2}, {"max_queued_requests": 9, "max_queued_tokens": 12}]
)
def test_a_full_queue_refuses_all_of_a_request(lm, metrics, limits):
    with started(lm, metrics, max_sequences=1, **limits) as engine:

        async def crowd():
            first = asyncio.create_task(collect(engine, job_of(lm, "The people are", 900)))
            while engine.num_running == 0 or engine.num_waiting:
                await asyncio.sleep(0.01)
            with pytest.raises(Busy, match="too many requests wait"):
                await collect(engine, *[job_of(lm, "The people are", 2)] * 20)
            assert engine.num_waiting == 0
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first

        asyncio.run(crowd())
        assert b'admission_rejections_total{model_name="neo"} 1.0' in metrics.text()


def test_what_cannot_be_done_is_said_at_once(lm, engine):
    for job, words in (
        (job_of(lm, PROMPTS[0], 5000), "exceed the context of 1024"),
        (Job([1, 99999]), "token id 99999 is not in the vocabulary"),
        (job_of(lm, PROMPTS[0], 2, num_alternatives=21), "room for 21 alternatives, not 20"),
    ):
        with pytest.raises(NeoError, match=words):
            asyncio.run(collect(engine, job))
    assert not engine._open


def test_draining_finishes_what_runs_and_refuses_the_rest(lm, metrics):
    with started(lm, metrics) as engine:

        async def run():
            task = asyncio.create_task(collect(engine, job_of(lm, PROMPTS[0], 60)))
            while engine.num_running == 0:
                await asyncio.sleep(0.005)
            drain = asyncio.create_task(asyncio.to_thread(engine.drain, 60))
            while engine.is_healthy:
                await asyncio.sleep(0.001)
            with pytest.raises(Busy, match="the server is ending"):
                await collect(engine, job_of(lm, PROMPTS[0], 2))
            _, reasons, _ = await task
            await drain
            return reasons

        assert asyncio.run(run()) == {(0, 0): "length"}


def test_draining_ends_what_takes_too_long(lm, metrics):
    with started(lm, metrics, max_sequences=2) as engine:

        async def run():
            jobs = [job_of(lm, prompt, 900) for prompt in PROMPTS[:3]]
            tasks = [asyncio.create_task(collect(engine, job)) for job in jobs]
            while engine.num_running < 2:
                await asyncio.sleep(0.005)
            begin = time.monotonic()
            await asyncio.to_thread(engine.drain, 0.2)
            assert time.monotonic() - begin < 1
            return [reasons for _, reasons, _ in await asyncio.gather(*tasks)]

        assert asyncio.run(run()) == [{(0, 0): "abort"}] * 3


def test_a_failure_reaches_every_client(lm, metrics, monkeypatch, caplog):
    with started(lm, metrics) as engine:
        failing = threading.Event()
        step = engine._scheduler.step

        def fail():
            if failing.is_set():
                raise ValueError("no memory")
            return step()

        monkeypatch.setattr(engine._scheduler, "step", fail)

        async def run():
            jobs = [job_of(lm, prompt, 900) for prompt in PROMPTS[:2]]
            tasks = [asyncio.create_task(collect(engine, job)) for job in jobs]
            while engine.num_running < 2:
                await asyncio.sleep(0.005)
            failing.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

        for error in asyncio.run(run()):
            assert isinstance(error, RuntimeError)
        assert not engine.is_healthy
        with pytest.raises(RuntimeError, match="the engine has failed"):
            asyncio.run(collect(engine, job_of(lm, PROMPTS[0], 2)))
        assert "no memory" in caplog.text


def test_what_prompts_begin_with_is_read_once(lm, metrics):
    with started(lm, metrics, prefix_bytes=10**8) as engine:
        beginning = "The law of the land is what the people have made it, and " * 40
        length = len(lm.prompt_ids(beginning))
        assert length > 512
        for end in ("no more.", "it is good.", "no more."):
            texts, _, _ = asyncio.run(collect(engine, job_of(lm, beginning + end)))
            expected = lm.generate(beginning + end, 12, temperature=0.9, top_p=0.95, seed=5)
            assert texts[0, 0] == expected
        counted = metrics.text().decode()
        assert f'prefix_cache_hits_total{{model_name="neo"}} {2 * (length // 256) * 256}' in counted
        assert engine._scheduler.prefixes.num_bytes > 10**6


def test_what_happened_is_counted(lm, engine, metrics):
    asyncio.run(collect(engine, job_of(lm, "The people", 7, [DRAWN, DRAWN])))
    asyncio.run(collect(engine, Job(lm.prompt_ids("The people"), pool="mean")))
    counted = {
        line.split("{")[0].removeprefix("vllm:"): float(line.rsplit(" ", 1)[1])
        for line in metrics.text().decode().splitlines()
        if not line.startswith("#") and "le=" not in line and "reason" not in line
    }
    prompt = len(lm.prompt_ids("The people"))
    assert counted["prompt_tokens_total"] == 2 * prompt
    assert counted["generation_tokens_total"] == 14
    assert counted["time_to_first_token_seconds_count"] == 1
    assert counted["inter_token_latency_seconds_count"] == 13
    assert counted["e2e_request_latency_seconds_count"] == 2
    assert counted["request_queue_time_seconds_count"] == 2
    assert counted["request_generation_tokens_sum"] == 14
    assert counted["num_requests_running"] == counted["num_requests_waiting"] == 0


def test_a_soft_prompt_is_read_first_and_is_no_part_of_a_prompt(lm, metrics):
    words = lm.encode("Once upon a time")
    model = lm.model.clone(virtual_tokens=len(words), soft_prompt=len(words))
    table = lm.params["wte"]["embedding"][np.array(words)]
    soft = LanguageModel(model, lm.params | {PROMPT: table}, lm.tokenizer, lm.folder)
    prompt = lm.encode(" there was a king")
    with started(soft, metrics) as engine:
        job = Job(prompt, 8, [DRAWN], prompt_alternatives=2)
        texts, _, items = asyncio.run(collect(engine, job))
    (sample,) = lm.samples([[*words, *prompt]], 8, sampling=DRAWN)
    assert texts == {(0, 0): sample.text}
    (found,) = (item for _, item in items if isinstance(item, PromptFound))
    assert [token.id for token in found.tokens] == prompt
    (score,) = lm.score([[*words, *prompt]])
    logprobs = [token.logprob for token in found.tokens[1:]]
    np.testing.assert_allclose(logprobs, score.logprobs[len(words) :], atol=1e-4)
    service = Service(soft, soft.tokenizer, engine, metrics, ("neo",))
    assert service.context == lm.config.max_length - len(words)
