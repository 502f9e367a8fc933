"""text/generate.py: where texts end, and which prompts fit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neo_jax
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.text.generate import StopText
from neo_jax.text.tokenizer import load_tokenizer

NEW = 24
SAMPLING = {"temperature": 1.0, "seed": 5}


@pytest.fixture(scope="module", params=["pieces", "bytes"])
def tokenizer(request, tokenizer_folders):
    return load_tokenizer(tokenizer_folders[request.param])


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


def cut(text, stops):
    """The text before the stop that is complete first, and of these the one that begins first."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(text.find(s) for s in stops if s in text[: min(ends)])] if ends else text


@settings(max_examples=100)
@given(data=st.data())
def test_a_text_ends_before_its_first_stop(tokenizer, text, data):
    """Whatever the tokens are that the stop lies across, and however many come at a time."""
    whole = text.replace("\n", " ")
    ids = tokenizer.encode(whole)
    prompt, new = ids[:5], ids[5:]
    full = StopText(tokenizer, prompt, [])
    assert full.push(new) is None
    full.flush()
    begin = data.draw(st.integers(0, len(full.text) - 9))
    stop = full.text[begin : begin + data.draw(st.integers(1, 8))]
    stopped = StopText(tokenizer, prompt, [stop, "never there"])
    keep, pushed, shown = None, 0, ""
    while keep is None and pushed < len(new):
        count = data.draw(st.integers(1, 7))
        keep = stopped.push(new[pushed : pushed + count])
        pushed += count
        shown += stopped.new()
        assert shown == stopped.text[: stopped.settled()]  # what was shown is never taken back
    shown += stopped.new(is_finished=True)
    assert stopped.stopped
    assert stopped.text == shown == cut(full.text, [stop])
    # Its ids are as few as hold all of it.
    for count, enough in ((keep, True), (keep - 1, False)):
        if count >= 0:
            part = StopText(tokenizer, prompt, [])
            part.push(new[:count])
            assert (len(part.text) >= len(stopped.text)) == enough


def test_what_may_begin_a_stop_is_held_back(tokenizer):
    text = StopText(tokenizer, [], ["the dog!", "dot"])
    text.push(tokenizer.encode("over the do"))
    assert text.text[: text.settled()].endswith("over ")
    shown = text.new()
    assert shown == text.text[: text.settled()]
    text.push(tokenizer.encode("g does"))
    assert text.settled() == len(text.text)
    assert shown + text.new() == text.text
    text.push(tokenizer.encode(" do"))
    assert text.new().isspace()
    assert (text.new(is_finished=True), text.new(is_finished=True)) == ("do", "")


def test_no_text_is_held_back_at_its_end(lm):
    """A stream whose end may begin a stop gives all of it, as generate does."""
    whole = lm.generate("The fox", NEW, **SAMPLING)
    stop = whole[-3:] + "~"
    assert "".join(lm.stream("The fox", NEW, stop=stop, **SAMPLING)) == whole
    assert lm.generate("The fox", NEW, stop=stop, **SAMPLING) == whole


def test_stops_of_samples_and_streams(lm):
    prompts = ["The fox", "Call me", lm.encode("The dog")]
    sampling = SamplingOptions(**SAMPLING)
    plain = lm.sample(prompts, NEW, 2, sampling)
    stops = [plain[0].text[9:12], plain[3].text[2:4]]
    found = lm.sample(prompts, NEW, 2, sampling, stop=stops, batch_size=4)
    assert sum(sample.finish_reason == "stop" for sample in found) >= 2
    for sample, before in zip(found, plain, strict=True):
        assert sample.text == cut(before.text, stops)
        assert sample.ids == before.ids[: len(sample.ids)]
        assert sample.logprobs == pytest.approx(before.logprobs[: len(sample.ids)], abs=1e-5)
        if sample.finish_reason != "stop":
            assert sample.ids == before.ids
    assert "".join(lm.stream(prompts[0], NEW, stop=stops, **SAMPLING)) == found[0].text
    assert found[0].text == plain[0].text[:9] or stops[1] in plain[0].text[:11]


def test_a_prompt_beyond_the_context_is_cut_to_its_newest_tokens(lm):
    ids = lm.encode("The quick brown fox jumps over the lazy dog, and the dog does not mind" * 2)
    room = lm.config.max_length - NEW
    assert len(ids) > room
    with pytest.raises(NeoError, match="exceed the context of 64"):
        lm.sample([ids], NEW)
    whole = lm.sample([ids, "The fox"], NEW, on_overflow="truncate")
    assert whole[0].prompt == ids
    assert whole[0].ids == lm.sample([ids[-room:]], NEW)[0].ids
    assert whole[1].ids == lm.sample(["The fox"], NEW)[0].ids
    assert "".join(lm.stream(ids, NEW, on_overflow="truncate")) == whole[0].text
    with pytest.raises(NeoError, match="exceed the context of 64"):
        lm.sample([ids], 64, on_overflow="truncate")  # there is no room at all


def test_stops_need_a_tokenizer(checkpoints):
    bare = neo_jax.load(checkpoints["bare"])
    with pytest.raises(NeoError, match="holds no tokenizer"):
        bare.sample([[1, 2]], NEW, stop="x")
