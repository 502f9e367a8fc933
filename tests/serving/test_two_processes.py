"""neo-jax serve on two processes: the texts of one, and an end of both."""

import dataclasses
import re
import signal
import threading

import httpx
import jax
import numpy as np
import pytest
from several_processes import Runs, ended

import neo_jax
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.labels import HeadConfig
from neo_jax.model.heads import init_head
from neo_jax.model.transformer import Neo


@pytest.fixture(scope="module")
def start(checkpoints, tmp_path_factory):
    """Starts a server of two processes of two devices; returns them and its address."""

    def call(runs, model):
        command = ["serve", "--model", model, "--mesh", "data=2,model=2"]
        command += ["--max-sequences", 4]
        first, second = runs("-m", "neo_jax", *command, "--port", 0, devices=2)
        said = ""
        while not (found := re.search(r"serving \S+ at (http://\S+)", said)):
            line = first.stderr.readline()
            assert line, said
            said += line
        return first, second, found[1]

    with Runs(tmp_path_factory.getbasetemp()) as runs:
        yield lambda model=checkpoints["pieces"]: call(runs, model)


def stream(url, on_first):
    """Returns the lines of a stream, the first of which something follows, or what broke it."""
    body = {"prompt": "The", "max_tokens": 50, "stream": True, "ignore_eos": True}
    lines = []
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                if not lines:
                    on_first()
                lines.append(line)
    except httpx.HTTPError as error:
        lines.append(type(error).__name__)
    return lines


def test_texts_and_vectors_are_those_of_one_process_and_a_signal_to_any_drains(start, checkpoints):
    first, second, url = start()
    lm, found = neo_jax.load(checkpoints["pieces"]), {}
    options = {"temperature": 1.0, "top_p": 0.9, "stop": ["th"]}

    def ask(seed):
        body = {"prompt": "The fox", "max_tokens": 5 + 3 * seed, "n": 2, "seed": seed, **options}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        found[seed] = [choice["text"] for choice in answer["choices"]]

    threads = [threading.Thread(target=ask, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        expected = lm.generate("The fox", 5 + 3 * seed, num_samples=2, seed=seed, **options)
        assert found[seed] == expected
    texts = ["The fox", "and the dog does not mind it", "I"]
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": texts}, timeout=60).json()
    for each, vectors in zip(answer["data"], lm.embed(texts), strict=True):
        np.testing.assert_allclose(each["embedding"], vectors.mean(axis=0), rtol=0, atol=1e-5)
    lines = stream(url, lambda: second.send_signal(signal.SIGTERM))
    assert (lines[-1], '"finish_reason":"length"' in lines[-2]) == ("data: [DONE]", True)
    status, _, err = ended(first)
    assert (status, err[-1]) == (0, "ending: requests have 30 s, or a second signal")
    assert ended(second) == (0, "", [])


def test_the_death_of_one_ends_both(start):
    first, second, url = start()
    lines = stream(url, second.kill)
    assert not any('"finish_reason":"length"' in line for line in lines)
    status, _, err = ended(first)
    died = "neo-jax: another process of this run died or cannot be reached; start all of them"
    assert (status, err[-1:]) == (1, [f"{died} again."])


def test_labels_are_those_of_one_process(start, checkpoints, tmp_path):
    lm = neo_jax.load(checkpoints["pieces"])
    config = dataclasses.replace(lm.config, head=HeadConfig("score", ("bad", "good", "so-so")))
    head = jax.tree.map(lambda leaf: 10 * leaf, init_head(Neo(config), jax.random.key(1)))
    save_pretrained(tmp_path, config, {**lm.params, **head}, tokenizer=lm.tokenizer)
    texts = ["The fox", "and the dog does not mind it", "a café in 日本", "I"]
    expected = neo_jax.load(tmp_path).classify(texts)
    assert len({each.label for each in expected}) > 1
    first, second, url = start(tmp_path)
    answer = httpx.post(f"{url}/classify", json={"input": texts}, timeout=60).json()
    assert [each["label"] for each in answer["data"]] == [each.label for each in expected]
    for found, each in zip(answer["data"], expected, strict=True):
        np.testing.assert_allclose(found["probs"], each.probabilities, rtol=1e-5)
    first.send_signal(signal.SIGTERM)
    assert (ended(first)[0], ended(second)) == (0, (0, "", []))
