"""Who answers in a conversation: a model in this process, or a server."""

import contextlib
import dataclasses
import http.client
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from neo_jax.decode.options import SamplingOptions
from neo_jax.devices.processes import say
from neo_jax.errors import NeoError, brief, reason
from neo_jax.model.soft_prompt import text_context
from neo_jax.text.conversation import Message, Reply, TooLong
from neo_jax.text.generate import stream
from neo_jax.text.options import TextOptions
from neo_jax.text.word_filter import WordFilter

if TYPE_CHECKING:
    from neo_jax.serving.templates import Template
    from neo_jax.text.language_model import LanguageModel

WITHHELD = "\n(a filter withholds the rest)"
"""Is said where it does."""

_POLL = 0.05  # seconds between two looks for whether an answer is to stop


def model_reply(
    lm: "LanguageModel",
    template: "Template",
    sampling: Callable[[], SamplingOptions],
    options: TextOptions,
    words: WordFilter | None = None,
) -> Reply:
    """Returns what answers by a model, before `words`; it is drawn as `sampling` says then."""
    stop = (*options.stop, *(each for each in template.stop if each not in options.stop))
    options = dataclasses.replace(options, stop=stop)
    tokenizer = lm.tokenizer
    assert tokenizer

    def reply(messages: Sequence[Message]) -> Iterator[str]:
        ids = lm.encode(template.render(messages), False)
        context, new = text_context(lm.model), options.max_new_tokens
        if len(ids) + new > context:
            raise TooLong(
                f"what was said, {len(ids)} tokens, and {new} new ones exceed the context of "
                f"{context}; say less, or lower --max-new-tokens."
            )
        before = words.count if words else 0
        yield from stream(lm.model, lm.params, tokenizer, ids, sampling(), options, words)
        if words and words.count > before:
            say(WITHHELD)

    return reply


def server_reply(
    url: str, key: str, fields: Callable[[], Mapping[str, Any]], stopped: threading.Event
) -> Reply:
    """Returns what answers by a server of OpenAI's API.

    Args:
      url: its address, with /v1 or without.
      key: what it lets in; "" for none.
      fields: gives what a request has next to its messages.
      stopped: ends an answer, and the waiting for it.

    Raises:
      NeoError: the address is none; and when an answer is wanted, all that hinders it.
    """
    parts = urlsplit(url)
    try:
        port, is_url = parts.port, parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_url = False
    if not is_url:
        raise NeoError(f"--server {brief(url)} is no address, as in http://127.0.0.1:8000.")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
    headers = {"content-type": "application/json"}
    headers |= {"authorization": f"Bearer {key}"} if key else {}

    def reply(messages: Sequence[Message]) -> Iterator[str]:
        connection = kind(parts.hostname or "", port)
        try:
            connection.connect()
            body = json.dumps({"messages": list(messages), "stream": True, **fields()})
            connection.request("POST", path, body.encode(), headers)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise NeoError(f"cannot reach {url}: {reason(error).rstrip('.')}.") from error
        sock, news = connection.sock, queue.Queue[str | Exception | None]()
        withheld = threading.Event()
        arguments = (connection, url, news, withheld)
        threading.Thread(target=_read, args=arguments, daemon=True).start()
        try:
            while not stopped.is_set():
                with contextlib.suppress(queue.Empty):
                    new = news.get(timeout=_POLL)
                    if new is None:
                        if withheld.is_set():
                            say(WITHHELD)
                        return
                    if isinstance(new, Exception):
                        raise new
                    yield new
        finally:  # wakes the thread, and tells the server
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    return reply


def _read(
    connection: http.client.HTTPConnection,
    url: str,
    news: "queue.Queue[str | Exception | None]",
    withheld: threading.Event,
) -> None:
    """Puts the pieces of an answer into a queue; at the end None, or what went wrong.

    Where a filter ended the answer, that is noted.
    """
    try:
        with contextlib.closing(connection), connection.getresponse() as answer:
            if answer.status != 200:
                news.put(_refusal(url, answer.status, answer.read(1_000_000)))
                return
            for line in answer:
                data = line.removeprefix(b"data: ").strip()
                if data == line.strip() or data == b"[DONE]":  # a comment, or the end
                    continue
                event = json.loads(data)
                if "error" in event:
                    news.put(NeoError(f"{url}: {event['error']['message']}"))
                    return
                for choice in event["choices"]:
                    news.put(choice["delta"].get("content") or "")
                    if choice.get("finish_reason") == "content_filter":
                        withheld.set()
            news.put(None)
    except (OSError, http.client.HTTPException) as error:
        news.put(NeoError(f"{url} went away: {reason(error).rstrip('.')}."))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        news.put(NeoError(f"{url} answers in another form than OpenAI's ({reason(error)})."))


def _refusal(url: str, status: int, body: bytes) -> NeoError:
    """Returns the error of an answer that is none."""
    try:
        error = json.loads(body)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"it answers with status {status}; is it a server of OpenAI's API?", None
    if code == "context_length_exceeded":
        return TooLong(message)
    if status == 401:
        message += " Here it is --api-key, or NEO_JAX_API_KEY."
    return NeoError(f"{url}: {message}")
