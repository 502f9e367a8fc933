"""serve --filter: no text, token or alternative that clients see has one of the words."""

import json

import pytest
from serving.conftest import Client

from neo_jax.errors import NeoError
from neo_jax.serving.app import make_app
from neo_jax.serving.engine import Engine, make_scheduler
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.service import Service
from neo_jax.serving.templates import PLAIN, Template
from neo_jax.text.word_filter import WordFilter

PROMPT = "The people of the"
DRAWN = {"temperature": 0.9, "seed": 5, "max_tokens": 60, "logprobs": 5}


@pytest.fixture(scope="module")
def whole(lm):
    """What the model writes without a filter."""
    return lm.generate(PROMPT, 60, temperature=0.9, top_p=1.0, seed=5)


@pytest.fixture(scope="module")
def word(whole):
    """A word in the middle of it."""
    return next(each for each in whole.split()[5:] if len(each) > 3 and each.isalpha())


@pytest.fixture(scope="module")
def served(lm, word, tmp_path_factory):
    """A client of a server with a filter, its counts, and its review file."""
    review = tmp_path_factory.mktemp("review") / "review.jsonl"
    metrics, words = Metrics("neo"), WordFilter([word.upper(), "people"], str(review))
    engine = Engine(lm, make_scheduler(lm, 4), metrics, words=words)
    template = Template(PLAIN, ("\nUser:",))
    engine.start()
    yield Client(make_app(Service(lm, lm.tokenizer, engine, metrics, ("neo",), template))), review
    engine.close()


def shown(choice):
    """All texts of tokens in a choice."""
    found = choice["logprobs"]
    if "content" in found:
        return [each["token"] for each in found["content"]]
    return found["tokens"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_text_ends_before_a_word(served, whole, word, stream):
    client, review = served
    before = len(review.read_text().splitlines())
    answer = client("POST", "/v1/completions", {"prompt": PROMPT, "stream": stream, **DRAWN})
    events = answer.events() if stream else [answer.json()]
    choices = [event["choices"][0] for event in events]
    text = "".join(choice["text"] for choice in choices)
    assert whole.startswith(text)
    assert whole[len(text) :].startswith(word)
    assert choices[-1]["finish_reason"] == "content_filter"
    tokens = [token for choice in choices for token in shown(choice)]
    assert text.startswith("".join(tokens))
    assert len(tokens) > 3
    others = {
        other.strip().lower()
        for choice in choices
        for top in choice["logprobs"]["top_logprobs"]
        for other in top
    }
    assert others
    assert not {word.lower(), "people"} & others
    lines = [json.loads(line) for line in review.read_text().splitlines()[before:]]
    assert [(line["word"], line["match"]) for line in lines] == [(word.upper(), word)]
    assert lines[0]["prompt"] == PROMPT


def test_a_prompt_that_is_echoed_stays(served, word):
    client, _ = served
    body = {"prompt": PROMPT, "echo": True, **DRAWN}
    choice = client("POST", "/v1/completions", body).json()["choices"][0]
    assert choice["text"].startswith(PROMPT)
    assert word not in choice["text"]
    assert choice["finish_reason"] == "content_filter"
    body = {"prompt": f"{word} people", "echo": True, "logprobs": 5, "max_tokens": 0}
    choice = client("POST", "/v1/completions", body).json()["choices"][0]
    assert choice["text"] == f"{word} people"
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [True, False])
def test_conversations_too(lm, stream):
    """With a word that the model's answer surely has."""
    template, metrics = Template("{{ messages[-1].content }}"), Metrics("neo")
    whole = lm.generate(PROMPT, 30, temperature=0)
    word = next(each for each in whole.split()[3:] if each.isalpha())
    engine = Engine(lm, make_scheduler(lm, 2), metrics, words=WordFilter([word]))
    engine.start()
    try:
        client = Client(make_app(Service(lm, lm.tokenizer, engine, metrics, ("neo",), template)))
        body = {"messages": [{"role": "user", "content": PROMPT}], "stream": stream}
        body |= {"temperature": 0, "max_tokens": 30, "logprobs": True, "top_logprobs": 5}
        answer = client("POST", "/v1/chat/completions", body)
        events = answer.events() if stream else [answer.json()]
        choices = [event["choices"][0] for event in events]
        said = [choice["delta" if stream else "message"] for choice in choices]
        text = "".join(each.get("content", "") for each in said)
        assert choices[-1]["finish_reason"] == "content_filter"
        assert whole.startswith(text)
        assert not WordFilter([word]).holds(text)
        assert word not in {token.strip() for choice in choices for token in shown(choice)}
        assert 'finished_reason="content_filter",model_name="neo"} 1.0' in metrics.text().decode()
    finally:
        engine.close()


def test_without_a_match_nothing_changes(lm, served):
    client, _ = served
    body = {"prompt": "It was", "temperature": 0, "max_tokens": 5, "logprobs": 0}
    answer = client("POST", "/v1/completions", body).json()
    choice = answer["choices"][0]
    assert choice["text"] == lm.generate("It was", 5, temperature=0)
    assert (choice["finish_reason"], len(choice["logprobs"]["tokens"])) == ("length", 5)
    assert answer["usage"]["completion_tokens"] == 5


def test_its_options(tmp_path):
    from neo_jax.cli.serve import Options

    with pytest.raises(NeoError, match="filter_review has no effect without a filter"):
        Options(filter_review=str(tmp_path / "x"))
