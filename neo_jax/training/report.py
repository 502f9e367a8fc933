"""What a user sees of a run: a progress bar on stderr, lines in metrics.jsonl.

Of several processes the first shows and writes them; the others go through the same steps.
"""

import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neo_jax.distributed import is_leader
from neo_jax.errors import NeoError
from neo_jax.paths import make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.metrics import MetricsFile, flops_per_token, peak_flops
from neo_jax.training.state import Metrics


class Evaluation(NamedTuple):
    """How well held-out text is predicted."""

    loss: float  # nats a token
    bits_per_byte: float


class Report:
    """Follows a run. A context manager: the bar is drawn between entering and leaving."""

    def __init__(self, config: TrainConfig, start_step: int):
        """Opens metrics.jsonl in the run's folder, to go on after `start_step`."""
        self._config = config
        path = make_path(config.output) / "metrics.jsonl" if is_leader() else Path(os.devnull)
        self._file = MetricsFile(path, start_step)
        self._flops = flops_per_token(config.model, config.sequence_length)
        self._peak = peak_flops(config.dtype)
        self._pending: tuple[int, Metrics] | None = None
        self._logged_step = start_step
        self._logged_time = 0.0
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (console.is_terminal and is_leader()),
        )
        self._task = self._progress.add_task("", total=config.steps, completed=start_step, text="")
        self._print_lines = not console.is_terminal and is_leader()

    def __enter__(self) -> "Report":
        self._logged_time = time.perf_counter()
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.flush()
        self._progress.stop()
        self._file.close()

    def step(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that is still running, and reports those of the one before.

        Reading a metric waits for its step; one step late, the device never waits for the host.
        """
        self.flush()
        self._pending = (step, metrics)

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports an evaluation; its time does not count as training."""
        self.flush()
        values = {"eval_loss": evaluation.loss, "eval_bits_per_byte": evaluation.bits_per_byte}
        self._file.write(step, **values)
        self._file.sync()
        self._say(
            f"step {step}: held-out loss {evaluation.loss:.4f} nats a token, "
            f"{evaluation.bits_per_byte:.4f} bits a byte"
        )
        self._logged_step, self._logged_time = step, time.perf_counter()

    def flush(self) -> None:
        """Reports what is still to be reported; waits for the step that runs."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        self._progress.update(self._task, completed=step)
        if step % self._config.log_every and step != self._config.steps:
            return
        values = {name: float(value) for name, value in metrics.items()}
        if values["skipped_in_a_row"] >= self._config.max_skipped:
            raise NeoError(
                f"the last {values['skipped_in_a_row']:.0f} steps to step {step} had no finite "
                "gradients and were skipped; go on with a lower optimizer.learning_rate, a "
                "smaller optimizer.clip_norm or dtype float32."
            )
        now = time.perf_counter()
        tokens_per_step = self._config.batch_size * self._config.sequence_length
        speed = tokens_per_step * (step - self._logged_step) / (now - self._logged_time)
        self._logged_step, self._logged_time = step, now
        utilisation = speed * self._flops / self._peak
        self._file.write(step, **values, tokens_per_second=speed, mfu=utilisation)
        text = f"loss {values['loss']:.4f}  {speed:,.0f} tokens/s  MFU {utilisation:.1%}"
        self._progress.update(self._task, text=text)
        if self._print_lines:
            self._say(f"step {step}/{self._config.steps}: {text}")

    def sync(self) -> None:
        """Reports what is still to be reported, and brings metrics.jsonl up to date with it."""
        self.flush()
        self._file.sync()

    def _say(self, line: str) -> None:
        if self._print_lines:
            print(line, file=sys.stderr, flush=True)
        elif is_leader():
            self._progress.console.print(line)
