"""How fast the steps of a model run: each is compiled, warmed up and timed, one after another."""

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.load import lay_out
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.devices.chips import Chip, chip
from neo_jax.devices.memory import device_memory, tree_bytes
from neo_jax.errors import NeoError
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.scan import Remat
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import Sharding, padded_rows, tree_shardings
from neo_jax.tools.benchmark.limits import Limits, measure_limits
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.tools.plan.steps import Kind
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives.next_token import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.preflight import check_run
from neo_jax.training.step import abstract_inputs, abstract_state, init_state, make_step

MIN_LENGTH = 16
"""Tokens of the shortest texts: decoding appends half of them, some at a time."""

_REPEATS = 5
_LONG_ENOUGH = 0.5  # seconds of decoding that are timed at once
_SURE = 0.3  # the share of the measured rate of products that a step is taken to reach


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


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A step and how long it took: figures of all devices together, NaN where it did not run."""

    kind: Kind
    batch: int  # sequences
    length: int  # tokens of each; of decoding, for how many the cache has room
    flops: float = math.nan  # of the step's products as traced, without what is computed again
    traffic: float = math.nan  # bytes that must move at least, see `PreparedStep`
    seconds: float = math.nan  # of a step, the median of repeats
    repeats: int = 0
    note: str = ""  # why it did not run

    @property
    def tokens(self) -> int:
        """Tokens that go through the model in a step."""
        return self.batch * (1 if self.kind == "decode" else self.length)

    @property
    def tokens_per_second(self) -> float:
        """The speed."""
        return self.tokens / self.seconds

    @property
    def flops_per_second(self) -> float:
        """The rate of products."""
        return self.flops / self.seconds

    @property
    def bytes_per_second(self) -> float:
        """The rate of what must move."""
        return self.traffic / self.seconds

    @property
    def intensity(self) -> float:
        """FLOPs for each byte that must move."""
        return self.flops / self.traffic


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


class PreparedStep(NamedTuple):
    """A step that has been compiled and has run once.

    Its traffic is what no implementation can do without: reading every weight and every slot of the
    cache in decoding, reading weights and writing the cache in prefill, reading and writing
    weights and optimizer in training. Activations may stay in caches, so they do not count.
    """

    flops: float
    traffic: float
    seconds: Callable[[], float]  # runs it again: of a step


class CannotRunError(Exception):
    """A step that is left out; the message says why."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Until when steps may run, and how fast products are."""

    deadline: float  # of `time.perf_counter`
    rate: float  # FLOP/s

    def check(self, flops: float) -> None:
        """Raises `CannotRunError` where work of so many FLOPs might not end in time."""
        needed, left = flops / (_SURE * self.rate), self.deadline - time.perf_counter()
        if needed > left:
            raise CannotRunError(
                f"may take {needed:.0f} s, {max(0, left):.0f} s are left of --seconds"
            )


def bench(setup: Setup, report: Callable[[Measurement], None]) -> Result:
    """Measures devices, and a model on them; `report` gets each figure as it is there."""
    result = Result(setup, measure_limits(setup.devices), [])
    budget = Budget(time.perf_counter() + setup.seconds, result.rate)
    for measurement in itertools.chain(_decoding(setup, budget), _training(setup, budget)):
        report(measurement)
        result.measurements.append(measurement)
    return result


def _decoding(setup: Setup, budget: Budget) -> Iterator[Measurement]:
    makers: dict[Kind, Callable[..., PreparedStep]]
    makers = {"prefill": prepare_prefill, "decode": prepare_decode}
    params = setup.load_params() if {*makers} & {*setup.kinds} else {}
    # Without an end of text no row ends before its time.
    model = setup.model.clone(config=dataclasses.replace(setup.model.config, eos_token_id=-1))
    for kind, make in makers.items():
        for length, batch in _sizes(setup, model.sharding, kind):
            prepare = functools.partial(make, model, params, batch, length, budget)
            yield measure(kind, batch, length, prepare, budget)


def _training(setup: Setup, budget: Budget) -> Iterator[Measurement]:
    """Yields figures of the step that `train` runs by default, with AdamW; it draws its weights."""
    model = setup.model.clone(sharding=setup.train_sharding)
    fields = {"model": model.config, "dtype": jnp.dtype(model.dtype).name, "remat": setup.remat}
    for length, batch in _sizes(setup, model.sharding, "train"):
        config = TrainConfig("", "", 1000, batch, length=length, **fields)
        prepare = functools.partial(prepare_train, model, config, budget)
        yield measure("train", batch, length, prepare, budget)


def _sizes(setup: Setup, sharding: Sharding | None, kind: Kind) -> list[tuple[int, int]]:
    """Returns the lengths and batches of a kind of step, the smallest first."""
    if kind not in setup.kinds:
        return []
    batches = {padded_rows(sharding, batch) for batch in setup.batches}
    return list(itertools.product(sorted(set(setup.lengths)), sorted(batches)))


def measure(
    kind: Kind, batch: int, length: int, make: Callable[[], PreparedStep], budget: Budget
) -> Measurement:
    """Times a step that `make` prepares; why one cannot run is noted."""
    try:
        prepared = make()
        times: list[float] = []
        while not times or (len(times) < _REPEATS and time.perf_counter() < budget.deadline):
            times.append(prepared.seconds())
    except CannotRunError as error:
        return Measurement(kind, batch, length, note=str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Measurement(kind, batch, length, note="out of memory")
    flops, traffic, _ = prepared
    return Measurement(kind, batch, length, flops, traffic, statistics.median(times), len(times))


def prepare_prefill(
    model: Neo, params: Params, batch: int, length: int, budget: Budget
) -> PreparedStep:
    """Prepares reading `batch` prompts of `length` tokens, with room for no more.

    Raises:
      CannotRunError: it would take too long, or more memory than there is.
    """
    arguments = _prompts(model, params, batch, length, length)
    flops = _compile(model, engine.prefill.trace(model, length, *arguments), budget, 2)
    prefill = functools.partial(engine.prefill, model, length, *arguments)
    traffic = _traffic(model, _without(params, "wte", "wpe"), prefill().cache)
    return PreparedStep(flops, traffic, lambda: _seconds(prefill))


def prepare_decode(
    model: Neo, params: Params, batch: int, length: int, budget: Budget
) -> PreparedStep:
    """Prepares appending tokens to `batch` texts, the second half of `length`.

    The model's vocabulary must hold no end of text, so that nothing stops early. Raises as
    `prepare_prefill`.
    """
    arguments = _prompts(model, params, batch, length, length // 2)
    _compile(model, engine.prefill.trace(model, length, *arguments), budget, 1)
    state = engine.prefill(model, length, *arguments)
    step = engine.run.on(model).trace(model, params, state, 1)
    flops = _compile(model, step, budget, 2 + _REPEATS)
    traffic = _traffic(model, _without(params, "wpe"), state.cache)

    def append(steps: int) -> Any:
        nonlocal state
        state = engine.run(model, params, state, steps)
        return state

    _seconds(append, 1)
    once = _seconds(append, 1)
    steps = max(1, min(int(_LONG_ENOUGH / once), (length - length // 2 - 2) // _REPEATS))
    return PreparedStep(flops, traffic, lambda: _seconds(append, steps) / steps)


def prepare_train(model: Neo, config: TrainConfig, budget: Budget) -> PreparedStep:
    """Prepares the training step of a config, on weights that are drawn; as `prepare_prefill`."""
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_step(model, optimizer, config)
    try:
        places, frozen = abstract_inputs(config, model)
        check_run(config, model, step, abstract_state(model, optimizer), places, frozen)
    except NeoError as error:
        raise CannotRunError(str(error)) from error
    rows, length = config.batch_size, config.sequence_length
    batch = Batch(
        jax.device_put(_tokens(model, (rows, length + 1)), places.tokens.sharding),
        jax.device_put(np.ones((rows, length), np.float32), places.weights.sharding),
    )
    state = init_state(model, optimizer, config.seed)
    useful = make_step(model, optimizer, dataclasses.replace(config, remat="none"))
    flops = traced_flops(useful.trace(state, batch), model.config)
    _compile(model, step.trace(state, batch), budget, 2)
    traffic = 2 * _traffic(model, (state.params, state.opt_state))

    def advance() -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    advance()
    return PreparedStep(flops, traffic, lambda: _seconds(advance))


def _prompts(model: Neo, params: Params, batch: int, length: int, prompt: int) -> tuple[Any, ...]:
    """Returns what prefill takes: rows of `length` tokens that begin with a prompt."""
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * batch)
    lengths, limits = np.full(batch, prompt, np.int32), np.full(batch, length, np.int32)
    return params, _tokens(model, (batch, length)), lengths, limits, settings


def _tokens(model: Neo, shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, model.config.vocab_size, shape, np.int32)


def _compile(model: Neo, traced: jax.stages.Traced, budget: Budget, times: int) -> float:
    """Compiles a step, which jit then finds; returns its FLOPs.

    Raises:
      CannotRunError: to run it so many times would take too long, or more memory than there is.
    """
    flops = traced_flops(traced, model.config)
    budget.check(times * flops)
    memory = traced.lower().compile().memory_analysis()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    there = device_memory(_num_devices(model))
    if needed > there:
        raise CannotRunError(
            f"out of memory: {needed / 1e9:.1f} GB of {there / 1e9:.1f} GB a device"
        )
    return flops


def _traffic(model: Neo, *trees: Any) -> float:
    return float(_num_devices(model) * tree_bytes(trees, tiled=False))


def _num_devices(model: Neo) -> int:
    return model.sharding.mesh.size if model.sharding else 1


def _without(params: Params, *names: str) -> Params:
    """Returns the parameters without tables of which single rows are read."""
    return {name: leaf for name, leaf in params.items() if name not in names}


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def random_params(model: Neo) -> Params:
    """Draws parameters in the model's dtype, each where it lives."""

    def draw(key: Array) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(model.dtype), init_params(model, key))

    places = None
    if model.sharding:
        places = tree_shardings(model.sharding, logical_axes(model), param_shapes(model))
    return lay_out(model.config, jax.jit(draw, out_shardings=places)(jax.random.key(0)))
