"""A server around an engine that writes the same words for everybody."""

import asyncio
import json
import threading
import time

import numpy as np
import pytest
import uvicorn

import neo_jax
from neo_jax.serving import server
from neo_jax.serving.app import make_app
from neo_jax.serving.jobs import Busy, Delta, PromptFound, Token
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.service import Service
from neo_jax.serving.templates import PLAIN, Template
from neo_jax.text.generate import StopText

WORDS = "the world.\nUser: é 🚀 is"


class FakeEngine:
    """Writes WORDS, over and over; the log p of a token is -1, and of alternatives -2, -3, ..."""

    def __init__(self, lm):
        self._tokenizer = lm.tokenizer
        self.words = lm.tokenizer.encode(WORDS)
        self.is_healthy = True
        self.error = None  # raised before anything
        self.fails_after = None  # raised after so many items
        self.holds_after = None  # waits for ever after so many items
        self.jobs = []  # of the last call
        self.running = 0
        self.calls = []  # of other methods
        self.has_failed = False
        self._closed = threading.Event()

    def start(self):
        self.calls.append("start")

    def drain(self, seconds):
        self.calls.append(f"drain {seconds:g}")
        self.is_healthy, self.error = False, Busy("the server is ending; try again later.")
        while self.running:
            time.sleep(0.01)

    def close(self):
        self.calls.append("close")
        self._closed.set()

    def wait(self):
        self._closed.wait()

    async def run(self, jobs):
        self.jobs = list(jobs)
        if self.error:
            raise self.error
        self.running += 1
        try:
            for count, (index, item) in enumerate(self._items(jobs)):
                if count == self.fails_after:
                    raise RuntimeError("the engine has failed")
                if count == self.holds_after:
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                yield index, item
        finally:
            self.running -= 1

    def _items(self, jobs):
        for index, job in enumerate(jobs):
            if job.prompt_alternatives is not None or job.pool:
                num = job.prompt_alternatives
                tokens = [] if num is None else [self.token(id, num) for id in job.ids]
                tokens[:1] = [Token(job.ids[0], None, [])] if tokens else []
                mean = np.full(4, len(job.ids) + 0.5, np.float32) if job.pool else None
                yield index, PromptFound(tokens, mean)
            for sample in range(len(job.options)):
                for delta in self._write(job, sample):
                    yield index, delta

    def _write(self, job, sample):
        text = StopText(self._tokenizer, job.ids, job.stop)
        for count in range(1, job.max_new_tokens + 1):
            id = self.words[(count - 1 + sample) % len(self.words)]
            is_stop = id in job.stop_token_ids
            is_stop = is_stop or text.push([id]) is not None
            is_end = is_stop or count == job.max_new_tokens
            new = text.new(is_end)
            reason = ("stop" if is_stop else "length") if is_end else None
            yield Delta(sample, new, [self.token(id, job.num_alternatives, sample)], reason)
            if is_end:
                return

    def token(self, id, num, sample=0):
        own = (id, -1.0 - sample)
        others = [(other, -2.0 - i) for i, other in enumerate(range(300, 330)) if other != id]
        return Token(*own, [own, *others][:num])


@pytest.fixture(scope="session")
def lm():
    return neo_jax.load()


@pytest.fixture
def engine(lm):
    return FakeEngine(lm)


@pytest.fixture
def make_service(lm, engine):
    def make(**options):
        taken = {"template": Template(PLAIN, ("\nUser:",)), "version": "1.2.3", **options}
        return Service(lm, lm.tokenizer, engine, Metrics("neo"), ("neo", "gpt-neo"), **taken)

    return make


@pytest.fixture
def service(make_service):
    return make_service()


class Answer:
    """What a client gets."""

    def __init__(self, messages):
        start = messages[0]
        self.status = start["status"]
        self.headers = {name.decode(): value.decode() for name, value in start["headers"]}
        self.body = b"".join(message.get("body", b"") for message in messages[1:])
        self.is_complete = not messages[-1].get("more_body", False)

    def json(self):
        return json.loads(self.body)

    def events(self):
        """The objects of a stream, which ends as it must."""
        *events, done, rest = self.body.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def error(self, status=400):
        """What is said of an error, which has OpenAI's form."""
        assert self.status == status, self.body
        found = self.json()
        assert found.keys() == {"error"}
        assert found["error"].keys() == {"message", "type", "param", "code"}
        assert "\n" not in found["error"]["message"]
        return found["error"]


class Client:
    """Sends requests to an application, without a network."""

    def __init__(self, app):
        self._app = app

    def __call__(self, method, path, body=None, headers=(), **options):
        return asyncio.run(self.send(method, path, body, headers, **options))

    async def send(self, method, path, body=None, headers=(), *, leaves=None, parts=None):
        """Sends a request.

        Args:
          method: of HTTP.
          path: of the URL.
          body: an object, or bytes.
          headers: pairs of texts.
          leaves: the client leaves when this event is set; without an answer None is returned.
          parts: of the body as the network has them, in place of it.
        """
        if not isinstance(body, bytes):
            body = b"" if body is None else json.dumps(body).encode()
        parts = [body] if parts is None else parts
        waiting = [
            {"type": "http.request", "body": part, "more_body": i + 1 < len(parts)}
            for i, part in enumerate(parts)
        ]
        sent = []
        leaves = leaves or asyncio.Event()

        async def receive():
            if waiting:
                return waiting.pop(0)
            await leaves.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            await asyncio.sleep(0)

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(name.encode(), value.encode()) for name, value in headers],
            "query_string": b"",
            "root_path": "",
            "server": ("test", 80),
            "scheme": "http",
        }
        await self._app(scope, receive, send)
        return Answer(sent) if sent else None


@pytest.fixture
def client(service):
    return Client(make_app(service))


@pytest.fixture
def make_client(make_service):
    return lambda **options: Client(make_app(make_service(**options)))


@pytest.fixture
def post(client):
    return lambda path, body: client("POST", path, body)


@pytest.fixture
def complete(post):
    """Sends a request to /v1/completions."""
    return lambda **body: post("/v1/completions", body)


@pytest.fixture
def chat(post):
    """Sends a conversation."""

    def send(*contents, **body):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
        return post("/v1/chat/completions", {"messages": messages, **body})

    return send


@pytest.fixture
def address(service):
    """The address of a server that listens."""
    with server.bind("127.0.0.1", 0) as bound:
        config = uvicorn.Config(make_app(service), lifespan="off", log_config=None, ws="none")
        running = uvicorn.Server(config)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [bound]})
        thread.start()
        while not running.started and thread.is_alive():
            time.sleep(0.01)
        yield server.url(bound)
        running.should_exit = True
        thread.join()
