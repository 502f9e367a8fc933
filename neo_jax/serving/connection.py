"""One request of HTTP: its body within bounds, its client while it waits, its key."""

import asyncio
import hmac
from collections.abc import Coroutine, Iterable
from typing import Any

from starlette.types import Receive, Scope

from neo_jax.serving.errors import ApiError

MOST_BYTES = 4_000_000
"""The longest body."""

BODY_SECONDS = 30.0
"""How long a client may take to send one."""

_DISCARDED = (
    16 * MOST_BYTES
)  # of a body that is too long: clients hear of it when they have sent it


class Gone(Exception):  # noqa: N818
    """The client has left: there is nobody to answer."""


async def read_body(receive: Receive) -> bytes:
    """Returns the body of a request.

    Raises:
      ApiError: it is too long, or takes too long.
      Gone: the client leaves.
    """
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _read_all(receive)
    except TimeoutError as error:
        message = f"the body was not there in {BODY_SECONDS:g} s; send it faster."
        raise ApiError(408, message, code="body_timeout") from error


async def _read_all(receive: Receive) -> bytes:
    parts, size, more = [], 0, True
    while more and size <= _DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Gone
        part = message.get("body", b"")
        size += len(part)
        more = message.get("more_body", False)
        if size <= MOST_BYTES:
            parts.append(part)
    if size > MOST_BYTES:
        why = f"the body is longer than {MOST_BYTES / 1e6:g} MB; send several requests."
        raise ApiError(413, why, code="body_too_large")
    return b"".join(parts)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Does work for a client, and drops it as soon as the client leaves.

    Raises:
      Gone: it has left.
    """
    task = asyncio.create_task(work)
    left = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        await task
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def check_key(scope: Scope, keys: Iterable[str]) -> None:
    """Checks that a request has one of some keys, in a time that says nothing of them.

    Raises:
      ApiError: it has none.
    """
    headers = [value for name, value in scope["headers"] if name == b"authorization"]
    kind, _, found = (headers[0] if headers else b"").partition(b" ")
    same = [hmac.compare_digest(found.strip(), key.encode()) for key in keys]
    if not (any(same) and kind.lower() == b"bearer" and len(headers) == 1):
        message = "a wrong API key, or none; send the header Authorization: Bearer KEY."
        raise ApiError(401, message, code="invalid_api_key")
