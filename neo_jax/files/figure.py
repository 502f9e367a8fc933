"""Pictures by matplotlib, written as PNG files. Without pyplot, whose state threads must not share.

matplotlib is an extra: only what draws imports it.
"""

import importlib.util
import io
from pathlib import Path
from typing import Any

from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import write_whole

AVAILABLE = importlib.util.find_spec("matplotlib") is not None
"""Whether matplotlib is installed."""


def check_available() -> None:
    """Raises `NeoError` where pictures cannot be drawn."""
    if not AVAILABLE:
        raise NeoError("a picture needs matplotlib: pip install 'neo_jax[plot]'.")


def new_figure(width: float, height: float, title: str = "", **options: Any) -> Any:
    """Returns a figure of so many inches, whose parts are placed without overlaps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **{"dpi": 100, "layout": "constrained", **options})
    if title:
        figure.suptitle(title)
    return figure


def as_png(figure: Any) -> bytes:
    """Returns the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write(path: Path, picture: bytes) -> None:
    """Writes a picture; a reader sees the file as it was, or all of the new one.

    Raises:
      NeoError: it cannot be written.
    """
    try:
        write_whole(path, picture)
    except OSError as error:
        raise NeoError(f"cannot write {path}: {reason(error)}.") from error
