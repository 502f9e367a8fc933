"""Stopping a run from outside without losing a step: SIGTERM, or Ctrl-C."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import BATCH, Array
from neo_jax.devices.signals import taken
from neo_jax.sharding.rules import make_sharding


class Interrupt:
    """Whether a run is to stop. A context manager, within which the first signal only requests it.

    The second one does what it always did; so does the first on the command line, where no step is
    behind the run that could be saved. Several processes stop at the same step: each step
    carries a flag of every process to all of them, which the next one reads, so that no device
    waits for a host. JAX's preemption service would do as much, but takes SIGTERM from the verbs
    that have nothing to save.
    """

    def __init__(self) -> None:
        """Requests nothing yet."""
        self._here = False  # this process got a signal
        self._anywhere: Array | None = None  # any process did, as of the step before
        self._begun = False
        self._taken = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        self._begun = jax.process_count() > 1  # what one of several does, all have to
        self._taken.enter_context(taken(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._taken.close()

    def requested(self) -> bool:
        """Returns whether to stop after this step; all processes call this after every step."""
        self._begun = True
        if jax.process_count() == 1:
            return self._here
        earlier = self._anywhere
        split, any_of = _any_of_all()
        flag = np.asarray([self._here])
        flags = jax.make_array_from_callback((jax.device_count(),), split, lambda _: flag)
        self._anywhere = any_of(flags)  # the devices compute it among their other work
        return earlier is not None and bool(earlier)

    def _note(self) -> bool:
        self._here = True
        return self._begun


@functools.cache
def _any_of_all() -> tuple[jax.sharding.Sharding, Any]:
    sharding = make_sharding("data=-1")
    assert sharding is not None
    split = sharding.named((BATCH,), (jax.device_count(),))
    return split, jax.jit(jnp.any, out_shardings=sharding.named((), ()))
