"""decode/lockstep.py: schedulers of several processes, of which one has the requests."""

import dataclasses

import numpy as np
import pytest
from decode_model import CONFIG, MODEL

from neo_jax.decode.lockstep import LeadingScheduler, follow
from neo_jax.decode.options import Room, SamplingOptions
from neo_jax.decode.requests import Event, Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.errors import NeoError

ROOM = Room(biases=16, alternatives=3)
TAKEN = {"rows": 3, "room": ROOM, "chunk": 16, "prefix_bytes": 10**8}


class Lines:
    """A channel that keeps what is sent."""

    def __init__(self):
        self.sent = []
        self.send = self.sent.append

    def lines(self):
        return iter(self.sent)

    def settle(self):
        pass


class Watched(Scheduler):
    """Keeps what it did."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def step(self):
        found = super().step()
        rows = [text and (text.id, text.sample) for text in self._rows]
        self.seen.append(([each[:3] for each in found if isinstance(each, Event)], rows))
        return found


class Leading(LeadingScheduler, Watched):
    pass


def make_request(rng, i):
    """Of any kind; some stop by what only process 0 knows."""
    options = SamplingOptions(
        temperature=1.0, seed=i, logit_bias={3: 0.5} if i % 2 else {}, top_p=0.3 + 0.1 * (i % 7),
        bad_words_ids=[[4, 5]] if i % 3 else [],
    )  # fmt: skip
    count = 1 + i % 2
    stops = []
    if i % 3 == 0:

        def stop(ids, seen=[]):  # noqa: B006 - of this request
            seen += ids
            return 2 if len(seen) >= 3 else None

        stops = [stop] + [lambda ids: None] * (count - 1)
    start = [7] * 16 if i % 2 else []  # a prefix that is kept
    ids = start + rng.integers(1, CONFIG.vocab_size, 4 + 9 * (i % 2)).tolist()
    each = [dataclasses.replace(options, seed=i + n) for n in range(count)]
    more = {"num_alternatives": i % 4, "prompt_logprobs": i % 5 == 0, "stream": i % 4 > 0}
    return Request(ids, 1 + i % 5, each, stops, **more)


def test_others_do_what_process_0_does(params):
    channel, rng = Lines(), np.random.default_rng(0)
    leader = Leading(channel, MODEL, params, **TAKEN)
    ids = []
    for i in range(10):
        ids.append(leader.submit(make_request(rng, i)))
        if i % 5 == 4:
            leader.cancel(ids[int(rng.integers(len(ids)))])
        for _ in range(int(rng.integers(3))):
            leader.step()
    while leader.busy:
        leader.step()
    follower = Watched(MODEL, params, **TAKEN)
    follow(follower, channel)
    # What process 0 stopped after a step, others stop before the next: between them rows differ.
    assert [events for events, _ in follower.seen] == [events for events, _ in leader.seen]
    assert any(
        rows != other for (_, rows), (_, other) in zip(leader.seen, follower.seen, strict=True)
    )
    assert follower.prefixes.hit == leader.prefixes.hit > 0


def test_a_sample_can_be_dropped_alone(params):
    scheduler = Scheduler(MODEL, params, **TAKEN)
    both = [SamplingOptions(seed=seed, ignore_eos=True) for seed in range(2)]
    id = scheduler.submit(Request([1, 2, 3], 8, both, stream=True))
    while scheduler.num_running < 2:
        scheduler.step()
    scheduler.cancel(id, 0)
    found = [event for _ in range(20) for event in scheduler.step()]
    assert {event.sample for event in found if isinstance(event, Event)} == {1}
    assert len(found[-1].completion.ids) == 8


def test_other_tokens_end_the_run(params):
    channel = Lines()
    leader = LeadingScheduler(channel, MODEL, params, **TAKEN)
    leader.submit(Request([1, 2, 3], 8, [SamplingOptions(seed=1, temperature=1.0)], stream=True))
    while leader.busy:
        leader.step()
    first = channel.sent[0].replace(b'"seed": 1', b'"seed": 2')
    assert first != channel.sent[0]
    channel.sent[0] = first
    with pytest.raises(NeoError, match="wrote other tokens than process 0"):
        follow(Scheduler(MODEL, params, **TAKEN), channel)


def test_a_step_that_fails_is_said(params, monkeypatch, caplog):
    channel, scheduler = Lines(), Scheduler(MODEL, params, **TAKEN)
    channel.send(b"[0, []]")
    monkeypatch.setattr(scheduler, "step", lambda: 1 / 0)
    with pytest.raises(NeoError, match="this process failed"):
        follow(scheduler, channel)
    assert "ZeroDivisionError" in caplog.text
