"""`neo-jax serve` as its users have it: a process, OpenAI's client, and SIGTERM."""

import contextlib
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import openai
import pytest


@pytest.fixture(scope="module")
def address():
    """Of a server of the bundled model; in the end it has served what it accepted."""
    command = [sys.executable, "-m", "neo_jax", "serve", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(
        [*command, "--chat-template", "plain"], stderr=subprocess.PIPE, text=True
    )
    try:
        said = ""
        while not (found := re.search(r"serving bundled at (http://\S+)", said)):
            line = process.stderr.readline()
            assert line, said
            said += line
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert "ending: requests have 30 s" in process.stderr.read()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_completions_are_those_of_generate(client, lm):
    options = {"temperature": 0.8, "top_p": 0.9, "seed": 4}
    expected = lm.generate("The people", 12, num_samples=2, **options)
    body = {"model": "bundled", "prompt": "The people", "max_tokens": 12, "n": 2, **options}
    answer = client.completions.create(**body)
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.completion_tokens == 24
    texts = ["", ""]
    for chunk in client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == expected


def test_scores_are_those_of_score(client, lm):
    answer = client.completions.create(
        model="bundled", prompt=["The people of", "It was"], max_tokens=0, echo=True, logprobs=2
    )
    for text, choice in zip(["The people of", "It was"], answer.choices, strict=True):
        first, *logprobs = choice.logprobs.token_logprobs
        assert first is None
        np.testing.assert_allclose(logprobs, lm.score(text).logprobs, rtol=0, atol=1e-4)
        assert choice.text == text


def test_a_conversation_and_embeddings(client, lm):
    answer = client.chat.completions.create(
        model="bundled", messages=[{"role": "user", "content": "Who are you?"}], max_tokens=8,
        temperature=0,
    )  # fmt: skip
    prompt = "User: Who are you?\nAssistant:"
    expected = lm.generate(prompt, 8, temperature=0, stop=["\nUser:"])
    assert answer.choices[0].message.content == expected
    found = client.embeddings.create(model="bundled", input=["The people", "It was"])
    for text, each in zip(["The people", "It was"], found.data, strict=True):
        np.testing.assert_allclose(each.embedding, lm.embed(text).mean(axis=0), rtol=0, atol=1e-5)


def test_many_clients_at_once(client, lm):
    found = {}

    def ask(seed):
        found[seed] = client.completions.create(
            model="bundled", prompt="The king " * (1 + 40 * (seed % 3)), max_tokens=10, seed=seed,
            temperature=1.0, top_p=1.0,
        )  # fmt: skip

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answer in found.items():
        prompt = "The king " * (1 + 40 * (seed % 3))
        expected = lm.generate(prompt, 10, seed=seed, temperature=1.0, top_p=1.0)
        assert answer.choices[0].text == expected
    assert len(found) == 12


def test_errors_are_openai_s(client):
    with pytest.raises(openai.BadRequestError, match="the context is 1024"):
        client.completions.create(model="bundled", prompt="a", max_tokens=2000)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="a")
