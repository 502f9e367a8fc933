"""loss.png: how the loss went so far."""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_jax.errors import NeoError
from neo_jax.files import figure

Lines = list[dict[str, Any]]


class LossPlot:
    """A `Sink` that draws in a thread of its own, so that training does not wait for it."""

    available = figure.AVAILABLE

    def __init__(self, path: Path, read: Callable[[], Lines]):
        """Draws into `path` what `read` returns: the lines of metrics.jsonl."""
        self._path = path
        self._read = read
        self._thread: threading.Thread | None = None

    def write(self, step: int, **values: float) -> None:
        """Takes nothing: what is drawn is read."""

    def sync(self) -> None:
        """Starts to draw what is known by now, unless the last drawing is still on its way."""
        if self.available and not (self._thread and self._thread.is_alive()):
            self._thread = threading.Thread(target=self._draw)
            self._thread.start()

    def close(self) -> None:
        """Draws for the last time."""
        if self._thread:
            self._thread.join()
        if self.available:
            self._draw()

    def _draw(self) -> None:
        picture = draw(self._read())
        # A full disk ends the run at its next checkpoint, in words of its own.
        with contextlib.suppress(NeoError):
            figure.write(self._path, picture)


def draw(lines: Lines) -> bytes:
    """Returns a PNG of the training loss (light) and the held-out loss (dark) over the steps."""
    picture = figure.new_figure(8, 5)
    axes = picture.add_subplot()
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "loss": ("training", {"color": "#9ecae1", "linewidth": 1}),
        "eval_loss": ("held out", {"color": "#08306b", "linewidth": 2, "marker": "o", "ms": 3}),
    }
    for name, (label, style) in styles.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if axes.lines:
        axes.legend()
    return figure.as_png(picture)
