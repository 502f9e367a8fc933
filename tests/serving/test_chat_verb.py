"""neo-jax chat --server: OpenAI's API from the side of a client."""

import io
import sys
import threading
import time

import pytest

from neo_jax import cli
from neo_jax.cli.chat_replies import server_reply
from neo_jax.errors import NeoError
from neo_jax.serving.jobs import Busy
from neo_jax.text.conversation import TooLong

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def talk(monkeypatch, capsys, address):
    def call(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = cli.main(["chat", "--server", address, *args])
        return (status, *capsys.readouterr())

    return call


def test_a_conversation_with_a_server(talk, engine, lm):
    status, out, err = talk(["Hello", "/retry"], "--max-new-tokens", "3", "--seed", "7",
                            "--top-k", "5", "--stop", "qq", "--min-new-tokens", "2",
                            "--logit-bias", "5", "1.5")  # fmt: skip
    assert (status, err) == (0, "")
    assert out == "the world.\nthe world.\n"
    (job,) = engine.jobs
    (options,) = job.options
    assert lm.tokenizer.decode(job.ids) == "User: Hello\nAssistant:"
    assert (options.seed, options.temperature, options.top_k) == (8, 0.7, 5)
    assert (options.min_new_tokens, options.logit_bias) == (2, ((5, 1.5),))
    assert job.stop == ("qq", "\nUser:")
    assert job.max_new_tokens == 3


def test_what_a_server_refuses(talk, engine):
    status, _, err = talk(["a"], "--no-repeat-ngram-size", "3")
    assert status == 1
    assert "unknown" in err
    assert "no_repeat_ngram_size" in err or "--no-repeat-ngram-size" in err
    engine.error = Busy("the queue is full")
    status, _, err = talk(["a"])
    assert status == 1
    assert "the queue is full" in err
    engine.error, engine.fails_after = None, 2
    status, out, err = talk(["a"])
    assert status == 1
    assert "the server failed" in err
    assert out.startswith("the")


def test_old_turns_are_left_out(talk):
    status, out, err = talk(["word " * 600, "word " * 500], "--max-new-tokens", "3")
    assert (status, len(out.splitlines())) == (0, 2)
    assert err == "(the oldest 2 messages no longer fit the context; they are left out)\n"


def test_an_answer_that_is_left_frees_its_place(address, engine):
    engine.holds_after = 2
    stopped = threading.Event()
    reply = server_reply(f"{address}/v1/", "", lambda: {"max_tokens": 50}, stopped)
    pieces = reply(HI)
    assert next(pieces) + next(pieces)
    assert engine.running == 1
    threading.Timer(0.1, stopped.set).start()
    assert list(pieces) == []
    end = time.monotonic() + 10
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.running == 0


def test_other_servers(address):
    reply = server_reply(f"{address}/nothing", "", dict, threading.Event())
    with pytest.raises(NeoError, match="there is nothing at '/nothing/v1/chat/completions'"):
        next(reply(HI))
    reply = server_reply(address, "", lambda: {"max_tokens": 5000}, threading.Event())
    with pytest.raises(TooLong):
        next(reply(HI))
