"""neo-jax serve: from a command line to a server, and to its end."""

import os
import signal
import socket
import sys
import threading
import time

import httpx
import pytest

from neo_jax import cli, serving
from neo_jax.cli.serve import Options
from neo_jax.serving import engine as engines


@pytest.fixture
def fail(capsys):
    """Runs a command line that must fail with one line, which it returns."""

    def call(*args):
        assert cli.main(["serve", *args]) in (1, 2)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1, err
        return err

    return call


def test_what_cannot_be_served(fail, monkeypatch, tmp_path):
    assert "at most 65535, not 70000" in fail("--port", "70000")
    assert "at least 1" in fail("--max-sequences", "0")
    assert "--api-key" in fail("--api-keys", "x")
    assert "is empty; leave it out" in fail("--api-key", "")
    assert "cannot listen on 8.8.8.8:8000" in fail("--host", "8.8.8.8")
    assert "no chat template 'plane'" in fail("--port", "0", "--chat-template", "plane")
    assert "no folder and no published model" in fail(
        "--port", "0", "--model", str(tmp_path / "nothing")
    )
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert "Address already in use; name another --port" in fail("--port", port)
    monkeypatch.delattr(serving, "server", raising=False)
    monkeypatch.setitem(sys.modules, "neo_jax.serving.server", None)
    assert "pip install 'neo_jax[serve]'" in fail("--port", "0")


def test_a_model_without_a_tokenizer(fail, checkpoints):
    assert "holds no tokenizer" in fail("--port", "0", "--model", str(checkpoints["bare"]))


def test_names_and_keys(monkeypatch):
    monkeypatch.delenv("NEO_JAX_API_KEY", raising=False)
    assert (Options().names, Options().keys) == (("bundled",), ())
    monkeypatch.setenv("NEO_JAX_API_KEY", "two")
    assert Options(api_key=("one",)).keys == ("one", "two")
    assert Options(served_model_name=("a", "b")).names == ("a", "b")


def test_a_server_from_its_first_line_to_its_end(monkeypatch, capsys, lm, engine):
    """SIGTERM: what was accepted is finished, new requests are refused, and the status is 0."""
    monkeypatch.setattr("neo_jax.text.load.load", lambda *args, **options: lm)
    made = {}

    def make(lm, scheduler, metrics, **options):
        made.update(options, scheduler=scheduler)
        return engine

    monkeypatch.setattr(engines, "Engine", make)
    monkeypatch.setattr(engines, "make_scheduler", lambda lm, *args: args)
    monkeypatch.setenv("NEO_JAX_API_KEY", "two")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = {}

    def visit():
        base = f"http://127.0.0.1:{port}"
        for _ in range(500):
            try:
                httpx.get(f"{base}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.01)
        with httpx.Client(base_url=base, headers={"authorization": "Bearer two"}) as client:
            found["models"] = client.get("/v1/models").json()["data"][0]["id"]
            body = {"prompt": "The", "max_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as stream:
                lines = stream.iter_lines()
                next(lines)
                os.kill(os.getpid(), signal.SIGTERM)
                while engine.is_healthy:
                    time.sleep(0.001)
                found["late"] = httpx.post(
                    f"{base}/v1/completions", json={}, headers=client.headers
                ).status_code
                found["health"] = httpx.get(f"{base}/health").status_code
                found["last"] = [line for line in lines if line][-1]

    def visit_and_end():
        try:
            visit()
        finally:
            if engine.is_healthy:  # it failed before it sent the signal
                os.kill(os.getpid(), signal.SIGTERM)

    slow = engine._items

    def items(jobs):
        for count, item in enumerate(slow(jobs)):
            if count:
                time.sleep(0.002)
            yield item

    monkeypatch.setattr(engine, "_items", items)
    visitor = threading.Thread(target=visit_and_end)
    visitor.start()
    status = cli.main(
        ["serve", "--port", str(port), "--served-model-name", "one", "--served-model-name", "two",
         "--shutdown-timeout", "20", "--chat-template", "plain", "--max-sequences", "4",
         "--max-queued-requests", "7", "--max-queued-tokens", "99", "--max-logprobs", "3",
         "--prefix-cache", "5"]
    )  # fmt: skip
    visitor.join()
    assert status == 0
    assert found == {"models": "one", "late": 503, "health": 503, "last": "data: [DONE]"}
    assert made == {
        "max_queued_requests": 7,
        "max_queued_tokens": 99,
        "words": None,
        "scheduler": (4, 3, 5_000_000, None),
    }
    assert engine.calls == ["start", "drain 20", "close"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("chat: GPT-Neo and GPT-2 are not instruction-tuned")
    assert lines[1].startswith(f"serving one at http://127.0.0.1:{port} (docs: http")
    assert lines[2] == "ending: requests have 20 s, or a second signal"
    assert len(lines) == 3
