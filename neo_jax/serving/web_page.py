"""The page for people, at `/`: a file that asks the same server as all clients do."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response

FILE = Path(__file__).parent / "page" / "index.html"
"""All of the page: it loads nothing else."""


def web_page() -> Response:
    """Returns the page, which runs its own script and talks to its own server alone."""
    text = FILE.read_bytes()
    headers = {
        "content-security-policy": _policy(text),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }
    return Response(text, headers=headers, media_type="text/html")


def _policy(text: bytes) -> str:
    """Returns what a page may do: its script and style are named by their hashes."""
    allowed = {
        "default-src": "'none'",
        "connect-src": "'self'",
        "script-src": _hashed(text, b"script"),
        "style-src": _hashed(text, b"style"),
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in allowed.items())


def _hashed(text: bytes, tag: bytes) -> str:
    (inner,) = re.findall(b"<%s>(.*?)</%s>" % (tag, tag), text, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"
