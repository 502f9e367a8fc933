"""What a user sees of a run: a progress bar on stderr; numbers, texts and a picture in its folder.

Of several processes the first shows and writes them; the others go through the same steps.
"""

import contextlib
import math
import sys
import time
import types
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neo_jax.devices.memory import peak_memory
from neo_jax.devices.probe import peak_flops
from neo_jax.devices.processes import is_leader
from neo_jax.errors import NeoError
from neo_jax.files.paths import make_path
from neo_jax.model.flops import flops_per_token
from neo_jax.training.config import TrainConfig
from neo_jax.training.sinks import LineFile, LossPlot, Sink, open_sinks
from neo_jax.training.step import Metrics

_WARM_UP = 2  # steps before a trace: the first compiles, the second may still fill queues


class Evaluation(NamedTuple):
    """How well held-out text is predicted, or held-out labels are."""

    loss: float  # nats a token; of a classifier as its objective has it
    # NaN where completions of prompts are predicted, or labels, and not all bytes
    bits_per_byte: float = math.nan
    scores: Mapping[str, float] = types.MappingProxyType({})  # of a classifier, the first counts

    @property
    def least(self) -> float:
        """What is least where a model is best."""
        return -next(iter(self.scores.values())) if self.scores else self.loss


class Report:
    """Follows a run. A context manager: the bar is drawn between entering and leaving."""

    def __init__(
        self,
        config: TrainConfig,
        start_step: int,
        bytes_per_token: float,
        num_devices: int = 1,
        changes: Mapping[str, str] = types.MappingProxyType({}),
        tokens_per_step: float = 0.0,
    ):
        """Opens the files in the run's folder, to go on after `start_step`.

        The bytes a token of completions are NaN. The devices are those of all processes; `changes`
        says what has changed in the config of a run that goes on, by field. A step has the tokens
        of full sequences, unless told.

        Raises:
          NeoError: a file cannot be written, or a package that the config requests is not there.
        """
        self._config = config
        self._tokens_per_step = tokens_per_step or config.batch_size * config.sequence_length
        self._start, self._changes = start_step, changes
        self._sinks: list[Sink] = []  # of numbers
        self._samples: list[LineFile] = []  # of texts
        if is_leader():
            output = make_path(config.output)
            lines = LineFile(output / "metrics.jsonl", start_step)
            plot = LossPlot(output / "loss.png", lines.read)
            self._sinks = [lines, *open_sinks(config, start_step), plot]
            if config.prompts:
                self._samples = [LineFile(output / "samples.jsonl", start_step)]
        self._bits_per_nat = 1 / math.log(2) / bytes_per_token  # bits a byte, that is
        self._flops = flops_per_token(config.model, config.sequence_length, config.is_frozen)
        self._peak = peak_flops(config.dtype, num_devices)
        self._pending: tuple[int, Metrics] | None = None
        self._trace = contextlib.ExitStack()
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
        steps, warmup = self._config.steps, self._config.optimizer.warmup_steps
        if self._start:
            finished = ": already finished" if self._start >= steps else ""
            changed = "".join(f"; {name} {change}" for name, change in self._changes.items())
            self._say(f"resuming at step {self._start} of {steps}{finished}{changed}")
        if 2 * warmup > steps:
            self._say(
                f"optimizer.warmup_steps {warmup} is more than half of {steps} steps: the learning "
                f"rate rises for most of the run; {steps // 10} would do"
            )
        if not LossPlot.available:
            self._say("no loss.png without matplotlib; pip install 'neo_jax[plot]'")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._trace.close()
        if kind is None:
            self.flush()
        self._progress.stop()
        for sink in (*self._sinks, *self._samples):
            sink.close()

    def step(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that is still running, and reports those of the one before.

        Reading a metric waits for its step; one step late, the device never waits for the host, but
        where the trace of a few steps that the config requests begins and ends.
        """
        self.flush()
        self._pending = (step, metrics)
        profile, before = self._config.profile, self._start + _WARM_UP
        if profile and is_leader() and step in (before, before + profile):
            jax.block_until_ready(metrics)
            self._trace.close()
            if step == before:  # for TensorBoard's profiler, XProf or Perfetto
                folder = str(make_path(self._config.output) / "profile")
                self._trace.enter_context(jax.profiler.trace(folder))

    def evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Reports an evaluation; its time does not count as training."""
        self.flush()
        scores, unit = evaluation.scores, "" if evaluation.scores else " nats a token"
        values, text = {"eval_loss": evaluation.loss}, f"{evaluation.loss:.4f}{unit}"
        values |= {f"eval_{name}": score for name, score in scores.items()}
        text += "".join(f", {name} {score:.4f}" for name, score in scores.items())
        if not math.isnan(evaluation.bits_per_byte):
            values["eval_bits_per_byte"] = evaluation.bits_per_byte
            text += f", {evaluation.bits_per_byte:.4f} bits a byte"
        self._write(step, **values)
        self.sync()
        self._say(f"step {step}: held-out loss {text}")
        self._logged_step, self._logged_time = step, time.perf_counter()

    def samples(self, step: int, texts: Iterable[str]) -> None:
        """Reports how the prompts of the config went on; its time does not count as training."""
        self.flush()
        for prompt, text in zip(self._config.prompts, texts, strict=True):
            for file in self._samples:
                file.write(step, prompt=prompt, text=text)
            self._say(f"step {step}: {prompt!r} goes on {text!r}")
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
        tokens_per_step = self._tokens_per_step
        speed = tokens_per_step * (step - self._logged_step) / (now - self._logged_time)
        self._logged_step, self._logged_time = step, now
        utilisation = speed * self._flops / self._peak
        if not math.isnan(self._bits_per_nat):
            values["bits_per_byte"] = values["loss"] * self._bits_per_nat
        values |= {"tokens_per_second": speed, "mfu": utilisation, "memory_bytes": peak_memory()}
        self._write(step, **values)
        text = f"loss {values['loss']:.4f}  {speed:,.0f} tokens/s  MFU {utilisation:.1%}"
        self._progress.update(self._task, text=text)
        if self._print_lines:
            self._say(f"step {step}/{self._config.steps}: {text}")

    def sync(self) -> None:
        """Reports what is still to be reported, and brings all files up to date with it."""
        self.flush()
        for sink in (*self._sinks, *self._samples):
            sink.sync()

    def _write(self, step: int, **values: float) -> None:
        for sink in self._sinks:
            sink.write(step, **values)

    def _say(self, line: str) -> None:
        if self._print_lines:
            print(line, file=sys.stderr, flush=True)
        elif is_leader():
            self._progress.console.print(line, markup=False, highlight=False)
