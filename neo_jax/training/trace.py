"""A trace of a few steps for TensorBoard's profiler, XProf or Perfetto."""

import contextlib

import jax

from neo_jax.devices.processes import is_leader
from neo_jax.files.paths import make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.step import Metrics

_WARM_UP = 2  # steps: the first compiles, the second may still fill queues


class Trace:
    """Traces `config.profile` steps from the third on, into output/profile, on process 0.

    A context manager: leaving it ends a trace that is still running.
    """

    def __init__(self, config: TrainConfig, start_step: int):
        """Plans which steps to trace."""
        self._folder = make_path(config.output) / "profile"
        self._before = start_step + _WARM_UP if config.profile and is_leader() else -1
        self._last = self._before + config.profile
        self._trace = contextlib.ExitStack()

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        self._trace.close()

    def step(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was started; waits for them where the trace begins."""
        if step in (self._before, self._last):
            jax.block_until_ready(metrics)
            self._trace.close()
        if step == self._before:
            self._trace.enter_context(jax.profiler.trace(str(self._folder)))
