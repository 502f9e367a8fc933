"""Where the numbers of a run go: lines of JSON, a plot; TensorBoard, Weights & Biases on request.

Process 0 alone opens them. The libraries are imported by the function that uses them.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from neo_jax.errors import NeoError, reason
from neo_jax.files import figure
from neo_jax.files.paths import is_remote, make_path, write_whole
from neo_jax.training.config import TrainConfig


class Sink(Protocol):
    """Takes named numbers of steps; a resumed run goes on where its checkpoint was."""

    def write(self, step: int, **values: float) -> None:
        """Takes the values of a step."""

    def sync(self) -> None:
        """Brings what others can see up to date."""

    def close(self) -> None:
        """Writes what is still to be written, and ends."""


class _Library(NamedTuple):
    """A sink of functions of a library."""

    write: Callable[..., None]
    sync: Callable[[], None]
    close: Callable[[], None]


def open_sinks(config: TrainConfig, start_step: int) -> list[Sink]:
    """Opens what a config requests in addition to metrics.jsonl.

    Raises:
      NeoError: a package is not installed, or refuses.
    """
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(_tensorboard(make_path(config.output) / "tensorboard", start_step))
    if config.wandb:
        sinks.append(_wandb(config, start_step))
    return sinks


class LineFile:
    """A `Sink` of JSON lines, each with its step; a resumed run drops those it will write again.

    Nothing can be appended in the cloud: there the lines are kept, and `sync` writes all of them.
    """

    def __init__(self, path: Path, start_step: int):
        """Opens the file, dropping lines of steps after `start_step`.

        Raises:
          NeoError: it cannot be written.
        """
        self._path = path
        kept = [line for line in self.read() if line["step"] <= start_step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        try:
            write_whole(path, text)
            remote = is_remote(path)
            self._file: IO[str] = io.StringIO() if remote else path.open("a", encoding="utf-8")
            if remote:
                self._file.write(text)
        except OSError as error:
            raise _unwritable(path, error) from error

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines on disk that are whole; a kill cuts one off."""
        lines = []
        texts = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        for text in texts.splitlines():
            with contextlib.suppress(ValueError, KeyError):
                line = json.loads(text)
                lines.append({"step": line["step"], **line})
        return lines

    def write(self, step: int, **values: float | str) -> None:
        """Appends one line: the step, and the values, numbers rounded to six digits.

        Raises:
          NeoError: the disk is full.
        """
        rounded = {
            name: value if isinstance(value, str) else float(f"{value:.6g}")
            for name, value in values.items()
        }
        try:
            print(json.dumps({"step": step, **rounded}), file=self._file, flush=True)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def sync(self) -> None:
        """Brings the file in the cloud up to date; one on disk always is."""
        if isinstance(self._file, io.StringIO):
            self._path.write_text(self._file.getvalue(), encoding="utf-8")

    def close(self) -> None:
        """Writes what is still to be written, and closes the file."""
        self.sync()
        # Each line was written out as it came; what a full disk refused then, and was reported, it
        # refuses once more.
        with contextlib.suppress(OSError):
            self._file.close()


class LossPlot:
    """A `Sink` that draws in a thread of its own, so that training does not wait for it."""

    available = figure.AVAILABLE

    def __init__(self, path: Path, read: Callable[[], list[dict[str, Any]]]):
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


def draw(lines: list[dict[str, Any]]) -> bytes:
    """Returns a PNG of the training loss (light) and the held-out loss (dark) over the steps.

    Where labels are predicted, below that the metrics on what is held out.
    """
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("eval_"))
    metrics = [name for name in names if name not in ("eval_loss", "eval_bits_per_byte")]
    picture = figure.new_figure(8, 7.5 if metrics else 5)
    panels = picture.subplots(2 if metrics else 1, squeeze=False, sharex=True)[:, 0]
    panels[-1].set(xlabel="step")
    panels[0].set(ylabel="loss" if metrics else "loss, nats a token")
    styles: dict[str, tuple[str, dict[str, Any]]] = {
        "loss": ("training", {"color": "#9ecae1", "linewidth": 1}),
        "eval_loss": ("held out", {"color": "#08306b", "linewidth": 2, "marker": "o", "ms": 3}),
    }
    _plot(panels[0], lines, styles)
    if metrics:
        panels[1].set(ylabel="held out")
        marked: dict[str, Any] = {"linewidth": 2, "marker": "o", "ms": 3}
        _plot(panels[1], lines, {name: (name.removeprefix("eval_"), marked) for name in metrics})
    return figure.as_png(picture)


def _plot(
    axes: Any, lines: list[dict[str, Any]], styles: dict[str, tuple[str, dict[str, Any]]]
) -> None:
    axes.grid(alpha=0.3)
    for name, (label, style) in styles.items():
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if axes.lines:
        axes.legend()


def _tensorboard(folder: Path, start_step: int) -> Sink:
    """Opens an event file; TensorBoard hides what older ones hold of steps to come.

    Of tensorboardX, which needs no TensorFlow.
    """
    _require("tensorboardX", "tensorboard")
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(step: int, **values: float) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return _Library(write, writer.flush, writer.close)


def _wandb(config: TrainConfig, start_step: int) -> Sink:
    """Starts a run in the project of the config, or resumes the one that output/wandb.txt names."""
    _require("wandb", "wandb")
    import wandb

    file = make_path(config.output) / "wandb.txt"
    if not (start_step and file.exists()):
        file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
    try:
        run = wandb.init(
            project=config.wandb,
            id=file.read_text(encoding="utf-8"),
            resume="allow",
            config=dataclasses.asdict(config),
        )
    except Exception as error:  # of the network, the login, the service
        raise NeoError(
            f"wandb cannot start a run in '{config.wandb}' ({reason(error)}); run wandb login, "
            "set WANDB_MODE=offline, or leave the field wandb of the config empty."
        ) from error
    # Else it would refuse the steps between a checkpoint and the kill, which come again.
    run.define_metric("*", step_metric="step")

    def write(step: int, **values: float) -> None:
        run.log({"step": step, **values})

    return _Library(write, lambda: None, run.finish)  # it sends by itself


def _require(package: str, extra: str) -> None:
    """Raises a `NeoError` where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise NeoError(
            f"the config requests {package}, which is not installed; pip install 'neo_jax[{extra}]'"
        )


def _unwritable(path: Path, error: OSError) -> NeoError:
    return NeoError(
        f"cannot write {path} ({reason(error)}); make room there or ask for write access, then "
        "give the same command: the run goes on from its newest checkpoint."
    )
