"""A trace of a few steps for TensorBoard's profiler, XProf or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from neo_jax.devices.processes import is_leader
from neo_jax.files.paths import make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.step import Metrics

_WARM_UP = 2  # steps: the first compiles, the second may still fill queues


@contextlib.contextmanager
def tracing(config: TrainConfig, start_step: int) -> Iterator[Callable[[int, Metrics], None]]:
    """Traces `config.profile` steps from the third on, into output/profile, on process 0.

    What it yields takes the metrics of each step as it was started, and waits for them where the
    trace begins and ends.
    """
    folder, before = make_path(config.output) / "profile", start_step + _WARM_UP
    last = before + config.profile
    with contextlib.ExitStack() as trace:

        def take(step: int, metrics: Metrics) -> None:
            if config.profile and is_leader() and step in (before, last):
                jax.block_until_ready(metrics)
                trace.close()
                if step == before:
                    trace.enter_context(jax.profiler.trace(str(folder)))

        yield take
