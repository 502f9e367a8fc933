"""The HTTP interface: what is answered at which path."""

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neo_jax.errors import brief, suggest
from neo_jax.files.json_text import read_json
from neo_jax.serving.bodies import Body, parse_body, read
from neo_jax.serving.chat import chat
from neo_jax.serving.completions import complete
from neo_jax.serving.connection import Gone, check_key, read_body, while_connected
from neo_jax.serving.errors import ApiError, busy, invalid
from neo_jax.serving.metrics import CONTENT_TYPE
from neo_jax.serving.pooled import classify, embed
from neo_jax.serving.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
)
from neo_jax.serving.reading_bodies import ClassifyBody, EmbeddingBody
from neo_jax.serving.replies import DONE, aside, event, to_json
from neo_jax.serving.requests import tokenize
from neo_jax.serving.service import Service
from neo_jax.serving.templates import special_tokens, tokenizer_folder
from neo_jax.serving.web_page import web_page

OPEN = frozenset(["/", "/health", "/ping", "/version", "/metrics"])
"""Paths that need no key."""

_LOG = logging.getLogger(__name__)
_ID = re.compile(rb"[\w.:-]{1,64}")  # what a client may call its request

Answer = dict[str, Any] | AsyncGenerator[dict[str, Any], None]
"""An object, or the events of a stream."""


def make_app(service: Service) -> ASGIApp:
    """Returns the application of a server."""
    posts: dict[str, tuple[type[Body], Callable[[Service, Any], Awaitable[Answer]]]] = {
        "/v1/completions": (CompletionBody, complete),
        "/v1/chat/completions": (ChatBody, chat),
        "/v1/embeddings": (EmbeddingBody, embed),
        "/classify": (ClassifyBody, classify),
        "/tokenize": (TokenizeBody, _tokenize),
        "/detokenize": (DetokenizeBody, _detokenize),
    }
    page = web_page()
    gets: dict[str, Callable[[Service, Request], Response]] = {
        "/": lambda *_: page,
        "/v1/models": lambda service, _: _json(_models(service)),
        "/v1/models/{model:path}": _model,
        "/tokenizer_info": lambda service, _: _json(tokenizer_info(service)),
        "/health": _health,
        "/ping": _health,
        "/version": lambda service, _: _json({"version": service.version}),
        "/metrics": lambda service, _: Response(service.metrics.text(), media_type=CONTENT_TYPE),
    }
    paths = [*posts, *gets]

    def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path, method = request.url.path, request.method
        message = f"there is nothing at {brief(path)}.{suggest(path, paths)}"
        if error.status_code == 405:
            message = f"{path} takes no {brief(method)}; see the header Allow."
        return _error(ApiError(error.status_code, message), error.headers)

    routes = [
        *(Route(path, _Post(service, *each), methods=["POST"]) for path, each in posts.items()),
        *(Route(path, _get(service, each), methods=["GET"]) for path, each in gets.items()),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={HTTPException: unknown},
        middleware=[Middleware(_Front, service.api_keys)],
    )
    app.router.redirect_slashes = False
    return app


class _Front:
    """What all requests meet first: a name, the key, and an answer whatever happens."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        known = given and _ID.fullmatch(given[0])
        name = given[0] if known else secrets.token_hex(16).encode()
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await send(message)

        try:
            if self._keys and scope["path"] not in OPEN:
                check_key(scope, self._keys)
            await self._app(scope, receive, named)
        except Gone:
            pass
        except ApiError as error:
            await _error(error)(scope, receive, named)
        except Exception:
            _LOG.exception("request %s, %s %r", name.decode(), scope["method"], scope["path"])
            if not begun:
                await _error(_FAILED)(scope, receive, named)


_FAILED = ApiError(500, "the server failed at this request; its log says why.", code="failed")


class _Post:
    """Answers requests with a body."""

    def __init__(
        self,
        service: Service,
        kind: type[Body],
        answer: Callable[[Service, Any], Awaitable[Answer]],
    ) -> None:
        self._service, self._kind, self._answer = service, kind, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        text = await read_body(receive)
        body = await aside(len(text), lambda: read(self._kind, parse_body(text)))

        async def work() -> None:
            found = await self._answer(self._service, body)
            if isinstance(found, dict):
                answer = await aside(len(text), _json, found)
                await answer(scope, receive, send)
            else:
                await _stream(found, send)

        await while_connected(receive, work())


async def _stream(found: AsyncGenerator[dict[str, Any], None], send: Send) -> None:
    """Sends events as they come; what goes wrong before the first is for the caller."""
    async with contextlib.aclosing(found) as events:
        new = await anext(events, None)
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no"}  # fmt: skip
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            while new is not None:
                await send({"type": "http.response.body", "body": event(new), "more_body": True})
                new = await anext(events, None)
        except Exception as error:  # too late for a status
            if not isinstance(error, ApiError):
                _LOG.exception("a stream failed")
            fault = error if isinstance(error, ApiError) else _FAILED
            last = {"type": "http.response.body", "body": event(fault.body), "more_body": True}
            await send(last)
    await send({"type": "http.response.body", "body": DONE, "more_body": False})


def _get(
    service: Service, answer: Callable[[Service, Request], Response]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return answer(service, request)

    return endpoint


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, media_type="application/json")


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    return _json(error.body, error.status, {**(headers or {}), **error.headers})


def _health(service: Service, _: Request) -> Response:
    if service.engine.is_healthy:
        return _json({"status": "ok"})
    return _error(busy("the server is ending, or has failed."))


_STARTED = int(time.time())


def _models(service: Service) -> dict[str, Any]:
    """Returns the one model, by all of its names."""
    fields = {"object": "model", "created": _STARTED, "owned_by": "neo_jax"}
    more = {"max_model_len": service.context}
    return {
        "object": "list",
        "data": [
            {"id": name, **fields, "root": service.names[0], **more} for name in service.names
        ],
    }


def _model(service: Service, request: Request) -> Response:
    name = service.name(request.path_params["model"])
    return _json(next(each for each in _models(service)["data"] if each["id"] == name))


async def _tokenize(service: Service, body: TokenizeBody) -> dict[str, Any]:
    service.name(body.model)
    ids = await asyncio.to_thread(tokenize, service, body)
    names = [service.tokenizer.token_name(id) for id in ids] if body.return_token_strs else None
    fields = {"count": len(ids), "max_model_len": service.context}
    return {**fields, "tokens": ids, "token_strs": names}


async def _detokenize(service: Service, body: DetokenizeBody) -> dict[str, Any]:
    service.name(body.model)
    size = service.lm.config.vocab_size
    if body.tokens and max(body.tokens) >= size:
        message = f"tokens has {max(body.tokens)}, which is no token id; they end at {size - 1}."
        raise invalid(message, "tokens")
    return {"prompt": await asyncio.to_thread(service.tokenizer.decode, body.tokens)}


def tokenizer_info(service: Service) -> dict[str, Any]:
    """Returns tokenizer_config.json, and what clients look for and it leaves out."""
    tokenizer = service.tokenizer
    path = tokenizer_folder(service.lm) / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    end = None if tokenizer.eos_id is None else tokenizer.token_name(tokenizer.eos_id)
    roles = {"bos_token": None, "pad_token": None, "unk_token": None, "eos_token": end}
    roles |= special_tokens(config)
    template = service.template.source if service.template else None
    kind = {"tokenizer_class": config.get("tokenizer_class") or type(tokenizer).__name__}
    return {**config, **roles, **kind, "chat_template": template}
