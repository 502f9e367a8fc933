"""All figures of a model, one after another."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.load import lay_out
from neo_jax.devices.chips import Chip, chip
from neo_jax.model.scan import Remat
from neo_jax.model.transformer import Neo, init_params, logical_axes
from neo_jax.sharding.rules import Sharding, padded_rows, tree_shardings
from neo_jax.tools.benchmark import timed_steps
from neo_jax.tools.benchmark.limits import Limits, measure_limits
from neo_jax.tools.benchmark.timed_steps import Budget, Kind, Measurement
from neo_jax.training.config import TrainConfig


class Setup(NamedTuple):
    """What to measure."""

    name: str  # of the model, as it is reported
    model: Neo  # as `load` holds it
    load_params: Callable[[], Params]  # gives its parameters; not called for training alone
    train_sharding: Sharding | None  # how `train` splits it
    kinds: Sequence[Kind]
    batches: Sequence[int]  # of sequences, over all devices; rounded up to what a mesh can split
    lengths: Sequence[int]  # of sequences, in tokens
    remat: Remat  # of training
    seconds: float  # in which steps may begin that would end in it

    @property
    def devices(self) -> list[jax.Device]:
        """Those that the model is on."""
        sharding = self.model.sharding
        return list(sharding.mesh.devices.flat) if sharding else [jax.local_devices()[0]]


class Result(NamedTuple):
    """What was measured."""

    setup: Setup
    limits: Limits
    measurements: list[Measurement]

    @property
    def published(self) -> Chip:
        """What is published of each device."""
        return chip(self.setup.devices[0].device_kind)

    @property
    def rate(self) -> float:
        """The measured rate of products in the model's dtype, FLOP/s."""
        return self.limits.products[jnp.dtype(self.setup.model.dtype).name]

    def share_of_products(self, step: Measurement) -> float:
        """Returns a step's rate of products as a share of that measured."""
        return step.flops_per_second / self.rate

    def share_of_memory(self, step: Measurement) -> float:
        """Returns the rate of what a step must move as a share of the bandwidth measured."""
        return step.bytes_per_second / self.limits.bandwidth

    def utilisation(self, step: Measurement) -> float:
        """Returns MFU, a step's rate of products as a share of the peak; NaN where it is unknown.

        Chowdhery et al., "PaLM", 2022, appendix B.
        """
        peak = self.published.peak_flops * len(self.setup.devices)
        return step.flops_per_second / peak


def bench(setup: Setup, report: Callable[[Measurement], None]) -> Result:
    """Measures devices, and a model on them; `report` gets each figure as it is there."""
    result = Result(setup, measure_limits(setup.devices), [])
    budget = Budget(time.perf_counter() + setup.seconds, result.rate)
    for measurement in itertools.chain(_decoding(setup, budget), _training(setup, budget)):
        report(measurement)
        result.measurements.append(measurement)
    return result


def _decoding(setup: Setup, budget: Budget) -> Iterator[Measurement]:
    makers: dict[Kind, Callable[..., timed_steps.PreparedStep]]
    makers = {"prefill": timed_steps.prepare_prefill, "decode": timed_steps.prepare_decode}
    params = setup.load_params() if {*makers} & {*setup.kinds} else {}
    # Without an end of text no row ends before its time.
    model = setup.model.clone(config=dataclasses.replace(setup.model.config, eos_token_id=-1))
    for kind, make in makers.items():
        for length, batch in _sizes(setup, model.sharding, kind):
            prepare = functools.partial(make, model, params, batch, length, budget)
            yield timed_steps.measure(kind, batch, length, prepare, budget)


def _training(setup: Setup, budget: Budget) -> Iterator[Measurement]:
    """Yields figures of the step that `train` runs by default, with AdamW; it draws its weights."""
    model = setup.model.clone(sharding=setup.train_sharding)
    dtype = jnp.dtype(model.dtype).name
    for length, batch in _sizes(setup, model.sharding, "train"):
        config = TrainConfig(
            "", "", 1000, batch, model=model.config, length=length, dtype=dtype, remat=setup.remat
        )
        prepare = functools.partial(timed_steps.prepare_train, model, config, budget)
        yield timed_steps.measure("train", batch, length, prepare, budget)


def _sizes(setup: Setup, sharding: Sharding | None, kind: Kind) -> list[tuple[int, int]]:
    """Returns the lengths and batches of a kind of step, the smallest first."""
    if kind not in setup.kinds:
        return []
    batches = {padded_rows(sharding, batch) for batch in setup.batches}
    return list(itertools.product(sorted(set(setup.lengths)), sorted(batches)))


def random_params(model: Neo) -> Params:
    """Draws parameters in the model's dtype, each where it lives."""

    def draw(key: Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(model.dtype), init_params(model, key))

    key, places = jax.random.key(0), None
    if model.sharding:
        places = tree_shardings(model.sharding, logical_axes(model), jax.eval_shape(draw, key))
    return lay_out(model.config, jax.jit(draw, out_shardings=places)(key))
