"""What all answers are made of: JSON, events of a stream, numbers of tokens, collected texts."""

import asyncio
import contextlib
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from neo_jax.serving.jobs import Delta, Job, PromptFound, Token
from neo_jax.serving.service import Service

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
"""Ends a stream."""

_LARGE = 4096  # characters or tokens
_LOWEST = -9999.0  # in the place of a log p that JSON has no number for


def to_json(value: Any) -> bytes:
    """Returns a value as JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate is \udc00 in JSON too


def event(value: Any) -> bytes:
    """Returns an event of a stream."""
    return b"data: " + to_json(value) + b"\n\n"


def finite(logprob: float) -> float:
    """Returns a log p that JSON can hold."""
    return logprob if math.isfinite(logprob) else _LOWEST


async def aside(size: int, function: Callable[..., T], *args: Any) -> T:
    """Calls a function, in a thread where what it works on is large: streams go on meanwhile."""
    return await asyncio.to_thread(function, *args) if size > _LARGE else function(*args)


def usage(prompt_tokens: int, completion_tokens: int | None = None) -> dict[str, int]:
    """Returns the numbers of tokens of a request, of new ones where it may have some."""
    new = {} if completion_tokens is None else {"completion_tokens": completion_tokens}
    total = prompt_tokens + (completion_tokens or 0)
    return {"prompt_tokens": prompt_tokens, **new, "total_tokens": total}


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """Returns what an answer begins with, and all events of a stream do."""
    name = f"{prefix}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


@dataclasses.dataclass
class Written:
    """A text, as far as it is known."""

    text: str = ""
    tokens: list[Token] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    def add(self, new: Delta) -> None:
        """Takes what is new of it."""
        self.text += new.text
        self.tokens += new.tokens
        self.finish_reason = new.finish_reason

    @property
    def mean_logprob(self) -> float:
        """By which the best of several are found; the lowest of a text without tokens."""
        found = [finite(token.logprob or 0.0) for token in self.tokens]
        return sum(found) / len(found) if found else -math.inf


@dataclasses.dataclass
class Collected:
    """What became of a job."""

    prompt: PromptFound | None
    texts: list[Written]


async def collect(service: Service, jobs: Sequence[Job]) -> list[Collected]:
    """Returns what became of jobs; raises as `Service.run`."""
    done = [Collected(None, [Written() for _ in job.options]) for job in jobs]
    async with contextlib.aclosing(service.run(jobs)) as found:
        async for index, new in found:
            if isinstance(new, PromptFound):
                done[index].prompt = new
            else:
                done[index].texts[new.sample].add(new)
    return done
