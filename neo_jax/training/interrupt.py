"""Stopping a run from outside without losing a step: SIGTERM, or Ctrl-C."""

import functools
import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import BATCH, Array
from neo_jax.sharding import make_sharding

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupt:
    """Whether a run is asked to stop. A context manager, within which the first signal only asks.

    The second one does what it always did. Several processes stop at the same step: each step
    carries a flag of every process to all of them, which the next one reads, so that no device
    waits for a host. JAX's preemption service would do as much, but takes SIGTERM from the verbs
    that have nothing to save.
    """

    def __init__(self) -> None:
        """Asks nothing yet."""
        self._here = False  # this process got a signal
        self._anywhere: Array | None = None  # any process did, as of the step before
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():  # Python asks for that
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def requested(self) -> bool:
        """Tells whether to stop after this step; all processes ask after every step."""
        if jax.process_count() == 1:
            return self._here
        earlier, self._anywhere = self._anywhere, _ask_any(self._here)
        return earlier is not None and bool(earlier)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self._here = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def _ask_any(here: bool) -> Array:
    """Starts to ask whether any process says yes; all must call this.

    Returns:
      A boolean scalar. The devices compute it among their other work; reading it waits for that.
    """
    split, any_of = _any_of_all()
    flags = jax.make_array_from_callback((jax.device_count(),), split, lambda _: np.asarray([here]))
    return any_of(flags)


@functools.cache
def _any_of_all() -> tuple[jax.sharding.Sharding, Any]:
    sharding = make_sharding("data=-1")
    assert sharding is not None
    split = sharding.named((BATCH,), (jax.device_count(),))
    return split, jax.jit(jnp.any, out_shardings=sharding.named((), ()))
