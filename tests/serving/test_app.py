"""serving/app.py, connection.py, server.py, metrics.py: paths, keys, limits, clients that leave."""

import asyncio
import base64
import contextlib
import copy
import dataclasses
import hmac
import json
import math
import random
import socket
import time

import jax.numpy as jnp
import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.serving import connection, server
from neo_jax.serving.app import OPEN, make_app
from neo_jax.serving.jobs import Busy
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from neo_jax.serving.reading_bodies import ClassifyBody, EmbeddingBody
from neo_jax.text.language_model import LanguageModel

USER = [{"role": "user", "content": "Hi"}]
COMPLETION = ("POST", "/v1/completions", {"prompt": "The", "max_tokens": 5})


def test_models(client):
    found = client("GET", "/v1/models").json()
    assert found["object"] == "list"
    assert [each["id"] for each in found["data"]] == ["neo", "gpt-neo"]
    assert client("GET", "/v1/models/gpt-neo").json() == found["data"][1]
    assert found["data"][0]["max_model_len"] == 1024
    error = client("GET", "/v1/models/EleutherAI/gpt-neo").error(404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    error = client("POST", "/v1/completions", {"model": "gpt-4"}).error(404)
    assert error["message"] == "the model 'gpt-4' does not exist; this server has neo, gpt-neo."


def test_paths_that_are_not_there(client):
    error = client("GET", "/v1/completion").error(404)
    assert "Did you mean '/v1/completions'" in error["message"]
    for method, path in (("GET", "/v1/completions"), ("POST", "/health"), ("PUT", "/tokenize")):
        found = client(method, path)
        found.error(405)
        assert found.headers["allow"]
    client("GET", "/v1/models/").error(404)
    client("POST", "/v1/completions/", {}).error(404)
    client("GET", "/\n\ud800".encode("utf-8", "replace").decode()).error(404)


def test_small_answers(client, service, lm):
    assert client("GET", "/health").json() == client("GET", "/ping").json() == {"status": "ok"}
    assert client("GET", "/version").json() == {"version": "1.2.3"}
    service.engine.is_healthy = False
    found = client("GET", "/health")
    found.error(503)
    assert found.headers["retry-after"] == "1"


def test_embeddings(client, engine):
    answer = client("POST", "/v1/embeddings", {"input": ["a b", "c"], "model": "neo"}).json()
    assert answer["object"] == "list"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [each["embedding"] for each in answer["data"]] == [[2.5] * 4, [1.5] * 4]
    assert [each["index"] for each in answer["data"]] == [0, 1]
    assert engine.jobs[0].pool == "mean"
    body = {"input": [[1, 2, 3]], "encoding_format": "base64"}
    (found,) = client("POST", "/v1/embeddings", body).json()["data"]
    assert np.frombuffer(base64.b64decode(found["embedding"]), "<f4").tolist() == [3.5] * 4
    client("POST", "/v1/embeddings", {"input": "a", "dimensions": 4}).error()
    body = {"input": "a b c", "pooling": "weighted", "normalize": True}
    (found,) = client("POST", "/v1/embeddings", body).json()["data"]
    assert found["embedding"] == pytest.approx([0.5] * 4)
    assert engine.jobs[0].pool == "weighted"
    assert (
        "one of mean, last, weighted"
        in client("POST", "/v1/embeddings", {"input": "a", "pooling": "max"}).error()["message"]
    )


def test_labels(client, make_service, lm):
    """As vLLM answers; of the pooled vector [2.5, 2.5, 2.5, 2.5] and a head of two labels."""
    head = HeadConfig("score", ("bad", "good"))
    config = dataclasses.replace(lm.config, head=head)
    params = {"score": {"kernel": jnp.array([[0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]])}}
    classifier = LanguageModel(lm.model.clone(config=config), params, lm.tokenizer, lm.folder)
    service = dataclasses.replace(make_service(), lm=classifier)
    client = type(client)(make_app(service))
    answer = client("POST", "/classify", {"input": ["a b", "c d"], "model": "neo"}).json()
    assert (answer["object"], answer["model"], answer["id"][:9]) == ("list", "neo", "classify-")
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 0, "total_tokens": 4}
    first = answer["data"][0]
    assert (first["index"], first["label"], first["num_classes"]) == (0, "good", 2)
    assert first["probs"] == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    body = {"input": "a b", "use_activation": False}
    assert client("POST", "/classify", body).json()["data"][0]["probs"] == pytest.approx([0, 1])
    said = client("POST", "/v1/completions", {"prompt": "a"}).error()
    assert "the model is a classifier" in said["message"]
    assert client("POST", "/classify", {"input": ""}).error()["param"] == "input"


def test_a_language_model_has_no_labels(client):
    said = client("POST", "/classify", {"input": "a"}).error()
    assert "the model is no classifier of texts" in said["message"]


def test_tokens(client, lm):
    ids = lm.tokenizer.encode("The people")
    found = client("POST", "/tokenize", {"prompt": "The people", "return_token_strs": True}).json()
    assert found == {
        "count": 2,
        "max_model_len": 1024,
        "tokens": ids,
        "token_strs": ["\u2581The", "\u2581people"],
    }
    body = {"prompt": "The people", "add_special_tokens": False}
    assert client("POST", "/tokenize", body).json()["token_strs"] is None
    assert client("POST", "/tokenize", {"prompt": ""}).json()["tokens"] == []
    found = client("POST", "/tokenize", {"messages": USER}).json()
    assert found["tokens"] == lm.tokenizer.encode("User: Hi\nAssistant:")
    assert client("POST", "/detokenize", {"tokens": ids}).json() == {"prompt": "The people"}
    assert client("POST", "/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert client("POST", "/detokenize", {"tokens": [4096]}).error()["param"] == "tokens"
    client("POST", "/tokenize", {"prompt": "\ud800"}).error()


def test_the_tokenizer(client, service, tmp_path):
    found = client("GET", "/tokenizer_info").json()
    assert found["eos_token"] == "<|endoftext|>"
    assert found["tokenizer_class"] == "SentencePieceTokenizer"
    assert found["bos_token"] is None
    assert "add_generation_prompt" in found["chat_template"]


def test_conversations_need_a_template(make_client):
    client = make_client(template=None)
    error = client("POST", "/v1/chat/completions", {"messages": USER}).error()
    assert error["code"] == "no_chat_template"
    assert "--chat-template plain" in error["message"]
    client("POST", "/tokenize", {"messages": USER}).error()


def test_keys(make_client):
    client = make_client(api_keys=("one", "twö"))
    for key in ("one", "twö"):
        # Headers are bytes: clients send UTF-8.
        assert client(*COMPLETION, headers=[("authorization", f"Bearer {key}")]).status == 200
    assert client(*COMPLETION, headers=[("authorization", "bearer  one ")]).status == 200
    for headers in (
        [],
        [("authorization", "Bearer")],
        [("authorization", "Bearer On")],
        [("authorization", "Bearer onee")],
        [("authorization", "Bearer ONE")],
        [("authorization", "Basic one")],
        [("authorization", "one")],
        [("authorization", "Bearer one"), ("authorization", "Bearer one")],
    ):
        found = client(*COMPLETION, headers=headers)
        assert found.error(401)["code"] == "invalid_api_key"
        assert found.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/nothing", "/tokenizer_info", "/v1/models/neo"):
        client("GET", path).error(401)
    assert {"/", "/health", "/ping", "/version", "/metrics"} == OPEN
    for path in OPEN:
        assert client("GET", path).status == 200


def test_all_keys_are_compared_in_constant_time(make_client, monkeypatch):
    compared = []
    compare = hmac.compare_digest

    def count(given, key):
        compared.append(key)
        return compare(given, key)

    monkeypatch.setattr(hmac, "compare_digest", count)
    client = make_client(api_keys=("one", "two", "three"))
    for key in ("one", "three", "x"):
        client(*COMPLETION, headers=[("authorization", f"Bearer {key}")])
    assert compared == [b"one", b"two", b"three"] * 3


def test_requests_have_names(client):
    assert client("GET", "/health", headers=[("x-request-id", "me:1.2-3")]).headers[
        "x-request-id"
    ] == ("me:1.2-3")
    for wrong in ("", "a b", "x" * 65, "é", "a\r\nb: c"):
        found = client("GET", "/nothing", headers=[("x-request-id", wrong)])
        assert len(found.headers["x-request-id"]) == 32


def test_long_and_slow_bodies(client, monkeypatch):
    monkeypatch.setattr(connection, "MOST_BYTES", 100)
    monkeypatch.setattr(connection, "_DISCARDED", 1000)
    assert client("POST", "/tokenize", {"prompt": "x" * 80}).status == 200
    for size in (100, 2000, 20_000):
        found = client("POST", "/tokenize", {"prompt": "x" * size})
        assert found.error(413)["code"] == "body_too_large"
    parts = [b'{"prompt":', b'"The people"', b"}"]
    assert client("POST", "/tokenize", parts=parts).json()["count"] == 2
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.05)

    async def slow():
        app = client._app

        async def receive():
            await asyncio.sleep(1)

        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/tokenize", "headers": [],
                 "query_string": b"", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(slow()) == 408


def test_what_is_no_json(client):
    for body in (b"", b"{", b"[" * 99999, b'{"a": NaN}', b"\xff\xfe", b'{"n":1,"n":1}'):
        found = client("POST", "/v1/completions", body).error()
        assert found["code"] == "invalid_json"
    client("POST", "/v1/completions", b"[]").error()


def test_a_full_queue(client, engine):
    engine.error = Busy("too many requests wait; try again later.")
    for body in ({}, {"stream": True}):
        found = client("POST", "/v1/completions", body)
        assert found.error(503)["message"] == "too many requests wait; try again later."
        assert found.error(503)["code"] == "server_busy"
        assert found.headers["retry-after"] == "1"
    client("POST", "/v1/embeddings", {"input": "a"}).error(503)
    engine.error = NeoError("a job that cannot be done")
    client("POST", "/v1/completions", {"stream": True}).error(400)


def test_what_goes_wrong_inside(client, engine, caplog):
    engine.error = RuntimeError("secret")
    for path, body in (
        ("/v1/completions", {}),
        ("/v1/completions", {"stream": True}),
        ("/v1/chat/completions", {"messages": USER}),
    ):
        error = client("POST", path, body).error(500)
        assert error["type"] == "server_error"
        assert "secret" not in error["message"]
    assert "RuntimeError: secret" in caplog.text
    engine.error, engine.fails_after = None, 2
    events = client("POST", "/v1/completions", {"stream": True}).events()
    assert [list(event) for event in events[-1:]] == [["error"]]
    assert len(events) == 3
    client("POST", "/v1/completions", {}).error(500)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 3])
def test_a_client_that_leaves_is_forgotten_at_once(client, engine, stream, after):
    engine.holds_after = after

    async def leave():
        left = asyncio.Event()
        body = {"prompt": "The", "max_tokens": 9, "stream": stream}
        task = asyncio.create_task(client.send("POST", "/v1/completions", body, leaves=left))
        for _ in range(1000):
            await asyncio.sleep(0 if not engine.running else 0.001)
        assert engine.running
        assert not task.done()
        left.set()
        found = await asyncio.wait_for(task, 1)
        assert engine.running == 0
        return found

    found = asyncio.run(leave())
    if stream and after:
        assert not found.is_complete
        assert found.body.count(b"data:") == after
    else:
        assert found is None


def test_a_client_that_leaves_before_its_body_is_complete(client):
    async def leave():
        left = asyncio.Event()
        left.set()
        app = client._app
        sent = []

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [],
                 "query_string": b"", "root_path": ""}  # fmt: skip
        await app(scope, receive, send)
        return sent

    assert asyncio.run(leave()) == []


def test_deadlines(make_client, engine):
    client = make_client(request_timeout=0.05)
    assert client(*COMPLETION).json()["choices"][0]["finish_reason"] == "length"
    engine.holds_after = 0  # it waits
    for more in ({}, {"stream": True}):
        error = client("POST", "/v1/completions", {"prompt": "The", **more}).error(503)
        assert "not done in 0.05 s" in error["message"]
    engine.holds_after = 3  # it writes
    body = {"prompt": ["The", "The"], "max_tokens": 9}
    first, second = client("POST", "/v1/completions", body).json()["choices"]
    assert (first["text"], first["finish_reason"]) == (" the world.", "abort")
    assert (second["text"], second["finish_reason"]) == ("", "abort")
    events = client("POST", "/v1/completions", {**body, "stream": True}).events()
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None, None, None, "abort", "abort"]
    engine.holds_after = 1  # of two, one is read
    client("POST", "/v1/embeddings", {"input": ["a", "b"]}).error(503)
    body |= {"echo": True, "logprobs": 1, "stream": True}
    assert engine.running == 0
    engine.holds_after = 3
    events = client("POST", "/v1/completions", body).events()
    assert events[-1]["error"]["code"] == "server_busy"


def test_metrics(client, service):
    metrics = service.metrics
    metrics.watch(lambda: 3, lambda: 2, lambda: 0.5)
    metrics.queued(7)
    metrics.admitted(0.02)
    metrics.read(7, 0.3)
    metrics.first_token(0.4)
    metrics.next_token(0.1)
    metrics.step(5)
    metrics.prefixes(600, 256, 4000)
    metrics.prefixes(900, 512, 5000)
    metrics.finished("stop", 2.0, 1.0, 5)
    metrics.finished("abort", 2.0, 0.0, 0)
    metrics.rejected()
    found = client("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample
        for family in text_string_to_metric_families(found.body.decode())
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }
    assert {sample.labels["model_name"] for sample in samples.values()} == {"neo"}
    values = {name: sample.value for name, sample in samples.items()}
    assert values == {
        ("vllm:num_requests_running", None): 3,
        ("vllm:num_requests_waiting", None): 2,
        ("vllm:kv_cache_usage_perc", None): 0.5,
        ("vllm:prompt_tokens_total", None): 7,
        ("vllm:prefix_cache_queries_total", None): 900,
        ("vllm:prefix_cache_hits_total", None): 512,
        ("vllm:prefix_cache_bytes", None): 5000,
        ("vllm:generation_tokens_total", None): 5,
        ("vllm:admission_rejections_total", None): 1,
        ("vllm:request_success_total", "stop"): 1,
        ("vllm:request_success_total", "length"): 0,
        ("vllm:request_success_total", "content_filter"): 0,
        ("vllm:request_success_total", "abort"): 1,
    } | {
        (f"vllm:{name}_{part}", None): value
        for name, count, total in (
            ("time_to_first_token_seconds", 1, 0.4),
            ("inter_token_latency_seconds", 1, 0.1),
            ("request_time_per_output_token_seconds", 1, 0.25),
            ("e2e_request_latency_seconds", 2, 4),
            ("request_queue_time_seconds", 1, 0.02),
            ("request_prefill_time_seconds", 1, 0.3),
            ("request_decode_time_seconds", 1, 1),
            ("request_prompt_tokens", 1, 7),
            ("request_generation_tokens", 2, 5),
            ("iteration_tokens_total", 1, 5),
        )
        for part, value in (("count", count), ("sum", total))
    }
    Metrics("two")  # a registry of its own: no name is taken


BODIES = {
    "/v1/completions": (
        CompletionBody,
        {
            "model": "neo", "prompt": "The people", "max_tokens": 5, "temperature": 0.5,
            "top_p": 0.9, "n": 2, "stop": ["\n", "x"], "logprobs": 2, "echo": True, "seed": 1,
            "logit_bias": {"5": -1}, "stream": True, "stream_options": {"include_usage": True},
            "stop_token_ids": [4], "min_tokens": 1, "presence_penalty": 0.5, "user": "me",
            "top_k": 5, "min_p": 0.1, "ignore_eos": True, "truncate_prompt_tokens": 3,
        },
    ),
    "/v1/chat/completions": (
        ChatBody,
        {
            "messages": [
                {"role": "system", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            ],
            "max_completion_tokens": 4, "logprobs": True, "top_logprobs": 2, "n": 2,
            "response_format": {"type": "text"}, "tools": [], "add_generation_prompt": True,
        },
    ),
    "/v1/embeddings": (EmbeddingBody, {"input": ["a", "b"], "encoding_format": "base64"}),
    "/classify": (ClassifyBody, {"input": ["a", "b"], "use_activation": True}),
    "/tokenize": (TokenizeBody, {"prompt": "The people", "return_token_strs": True}),
    "/detokenize": (DetokenizeBody, {"tokens": [5, 6, 7]}),
}  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 17, 4096, 10**6, 2**31, 2**32, 2**63, -(2**63), 10**30, 0.0,
    -0.5, 1.5, 1e-300, 1e300, "", " ", "x", "neo", "é🚀", "\x00", "\ud800", "x" * 5000, [], [[]],
    [0], [-1], [1, "a"], ["a", ""], [[1], [2]], [[[1]]], [None], {}, {"a": 1}, {"5": 1},
    {"role": "user", "content": "x"}, [{"role": "user", "content": ""}], [{}], {"type": "text"},
]  # fmt: skip


def mutate(rng, value, depth=0):
    """Returns a value of JSON with a change somewhere in it."""
    if isinstance(value, dict) and value and depth < 3 and rng.random() < 0.8:
        name = rng.choice(sorted(value))
        return value | {name: mutate(rng, value[name], depth + 1)}
    if isinstance(value, list) and value and depth < 3 and rng.random() < 0.6:
        place = rng.randrange(len(value))
        return [*value[:place], mutate(rng, value[place], depth + 1), *value[place + 1 :]]
    return copy.deepcopy(rng.choice(VALUES))


def mutated(rng, kind, body):
    """Returns the bytes of a body that may be wrong in some ways."""
    body = dict(body)
    names = [field.name for field in dataclasses.fields(kind)]
    names += [*kind.lacking, *kind.ignored, "unknown", ""]
    for _ in range(rng.randrange(4)):
        action = rng.random()
        if action < 0.3:
            body[rng.choice(names)] = copy.deepcopy(rng.choice(VALUES))
        elif action < 0.5 and body:
            del body[rng.choice(sorted(body))]
        else:
            body = mutate(rng, body)
            body = body if isinstance(body, dict) else {}
    text = json.dumps(body).encode()
    if rng.random() < 0.25:
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(
            [b"", b"\xff", b"{", b"NaN", b"\x00", b"[" * 2000, b'"', b"1e999", b"9" * 5000]
        ) + text[place + rng.randrange(3) :]  # fmt: skip
    return text


def test_no_request_makes_the_server_fail(client, caplog):
    rng = random.Random(0)
    counts = {}

    async def send_all():
        for _ in range(2000):
            path, (kind, body) = rng.choice(list(BODIES.items()))
            text = mutated(rng, kind, body)
            found = await asyncio.wait_for(client.send("POST", path, text), 30)
            counts[found.status] = counts.get(found.status, 0) + 1
            if found.status != 200:
                assert found.status in (400, 404), (path, text, found.body)
                assert found.error(found.status)["message"]
            elif found.headers["content-type"].startswith("text/event-stream"):
                assert not [each for each in found.events() if "error" in each], (path, text)
            else:
                assert found.json()

    asyncio.run(send_all())
    assert not caplog.records
    assert counts[200] > 200
    assert counts[400] > 500


def test_openai(address, engine):
    """OpenAI's own client, over a socket."""
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["neo", "gpt-neo"]
        assert client.models.retrieve("gpt-neo").id == "gpt-neo"
        options = {"model": "neo", "prompt": "The", "max_tokens": 3}
        found = client.completions.create(**options, logprobs=1, echo=True)
        assert found.choices[0].text == "The the world."
        assert found.choices[0].logprobs.token_logprobs == [None, -1, -1, -1]
        assert found.usage.completion_tokens == 3
        stream = client.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
        *chunks, last = stream
        assert "".join(chunk.choices[0].text for chunk in chunks) == " the world."
        assert last.usage.total_tokens == 4
        talk = {"model": "neo", "messages": USER, "max_tokens": 3}
        answer = client.chat.completions.create(**talk, logprobs=True, top_logprobs=1)
        assert answer.choices[0].message.content == " the world."
        assert answer.choices[0].logprobs.content[0].token == " the"
        chunks = client.chat.completions.create(**talk, stream=True)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == " the world."
        values = client.embeddings.create(model="neo", input="a b").data[0].embedding
        assert list(values) == [2.5] * 4  # sent as base64
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(**options, best_of=0)
        assert (bad.value.param, bad.value.code) == ("best_of", "invalid_value")
        assert bad.value.request_id
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-4", prompt="x")
        engine.error = Busy("full")
        with pytest.raises(openai.InternalServerError) as full:
            client.completions.create(**options)
        assert full.value.status_code == 503
        engine.error, engine.fails_after = None, 1
        stream = client.completions.create(**options, stream=True)
        with pytest.raises(openai.APIError, match="the server failed"):
            list(stream)


def test_clients_that_are_killed(address, engine):
    """Over a socket: the connection is closed in the middle of an answer."""
    engine.holds_after = 2
    host, port = address.removeprefix("http://").split(":")
    for stream in (True, False):
        body = json.dumps({"prompt": "The", "stream": stream}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s"
        with socket.create_connection((host, int(port))) as connected:
            connected.sendall(request % (len(body), body))
            if stream:
                assert b"200 OK" in connected.recv(4096)
            for _ in range(200):
                if engine.running:
                    break
                time.sleep(0.01)
            assert engine.running == 1
        for _ in range(200):
            if not engine.running:
                break
            time.sleep(0.01)
        assert engine.running == 0


def test_no_port():
    with server.bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(NeoError, match=rf"127.0.0.1:{port}: Address already in use; name ano"):
            server.bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "x" * 300, "\ud800", "8.8.8.8"):
        with pytest.raises(NeoError, match="cannot listen on"):
            server.bind(host, 0)
    with contextlib.suppress(NeoError), server.bind("::1", 0) as bound:  # where there is IPv6
        assert server.url(bound).startswith("http://[::1]:")
