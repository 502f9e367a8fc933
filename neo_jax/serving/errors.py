"""What a client is answered when its request cannot be done, in OpenAI's form."""

from typing import Any

from neo_jax.errors import NeoError

RETRY_AFTER = 1
"""Seconds after which a client that was refused for want of room may come again."""


class ApiError(Exception):
    """A request that is refused: an HTTP status, and a message that says how to fix it."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        """Describes it; `param` is the field that is wrong, `code` a word for programs."""
        self.status = status
        self.message = str(NeoError(message))  # whatever clients send, it is a line of bounded size
        self.param = None if param is None else str(NeoError(param[:100]))
        self.code = code
        super().__init__(self.message)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}

    @property
    def headers(self) -> dict[str, str]:
        """What is sent next to it."""
        if self.status == 503:
            return {"Retry-After": str(RETRY_AFTER)}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """Returns the error of a field that is wrong."""
    return ApiError(400, message, param, code)


def busy(message: str) -> ApiError:
    """Returns the error of a server that has no room."""
    return ApiError(503, message, code="server_busy")
