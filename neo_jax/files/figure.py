"""Pictures by matplotlib, written as PNG files. Without pyplot, whose state threads must not share.

matplotlib is an extra: only what draws imports it.
"""

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import write_whole

AVAILABLE = importlib.util.find_spec("matplotlib") is not None
"""Whether matplotlib is installed."""


INK, FAINT = "#222222", "#8a8a8a"
"""The colours of what is read first, and of what stands by."""


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


def name_rows(axes: Any, names: Sequence[str], size: float = 9.5, numbers: float = 8.5) -> None:
    """Names the rows 0, 1, ... of a plot, from top to bottom, with numbers below and no frame."""
    axes.set_yticks(range(len(names)), names, fontsize=size, color=INK)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", which="both", color=FAINT, labelcolor=FAINT, labelsize=numbers)


def legend_below(figure: Any, axes: Any, **options: Any) -> None:
    """Puts a legend below all plots, of what one of them has, each label once."""
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower left", frameon=False, labelcolor=INK,
                  **options)  # fmt: skip


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
