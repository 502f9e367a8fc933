"""What this package reaches on the device: its limits, decoding, prefill and training."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accelerator.programs import draw, prepare
from accelerator.rows import Row
from accelerator.sizes import Sizes
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.devices.memory import peak_memory, tree_bytes
from neo_jax.model.declared import param_shapes
from neo_jax.model.flops import flops_per_token
from neo_jax.model.transformer import Neo
from neo_jax.tools.benchmark.limits import measure_limits
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives.next_token import Batch
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.preflight import device_memory
from neo_jax.training.step import abstract_inputs, abstract_state, make_step, state_of
from neo_jax.transforms.quantize import quantized_shapes

_REPEATS = 3


def limits(sizes: Sizes) -> Row:
    """Measures what the device can do, and says what it is."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        **dataclasses.asdict(measure_limits([device], sizes.read_bytes)),
    }


class Decoding(NamedTuple):
    """A model, its weights, and how many texts it continues at once."""

    model: str
    weights: str  # "bfloat16" or "int8"
    batch: int


def decodings(sizes: Sizes, model: str) -> dict[str, Decoding]:
    """Returns what is decoded of one model, by name."""
    found = [Decoding(model, w, b) for w in ("bfloat16", "int8") for b in sizes.batches]
    return {f"{model} {each.weights} batch {each.batch}": each for each in found}


def start_decoding(
    sizes: Sizes, wanted: Sequence[Decoding], at_once: int
) -> Callable[[Decoding], Row]:
    """Returns what gives the row of a case; all programs are compiled before."""
    programs = prepare(functools.partial(_compile_decoding, sizes), wanted, at_once, done=True)
    weights: dict[str, Any] = {}

    def measure(case: Decoding) -> Row:
        program, shapes, state = programs(case)
        if case.weights not in weights:
            weights.clear()  # before others are drawn
            weights[case.weights] = draw(shapes)
        return _decode(program, weights[case.weights], state, case, sizes.seconds)

    return measure


def _compile_decoding(sizes: Sizes, case: Decoding) -> tuple[Any, Any, Any]:
    """Returns the loop of decoding, the shapes of its weights and those of its state."""
    config, batch = sizes.models[case.model], case.batch
    model = Neo(config, jnp.bfloat16)
    int8 = case.weights == "int8"
    shapes = quantized_shapes(config, model.dtype) if int8 else _weight_shapes(model)
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * batch)
    tokens, ones = jnp.zeros((batch, 16), jnp.int32), jnp.ones(batch, jnp.int32)
    arguments = (shapes, tokens, ones, sizes.room * ones, settings)
    state = jax.eval_shape(functools.partial(engine.prefill, model, sizes.room), *arguments)
    state = state._replace(settings=settings)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    return engine.run.on(model).lower(model, shapes, state, steps).compile(), shapes, state


def _empty(state: engine.DecodeState, room: int) -> engine.DecodeState:
    """Returns a state of texts of one token: what prefill gives, without a program for it."""

    def fill(leaf: Any) -> Any:
        return jnp.zeros(leaf.shape, leaf.dtype)

    settings = jax.tree.map(jnp.asarray, state.settings)
    blank = jax.tree.map(fill, state._replace(settings=()))
    cache = tuple(layer._replace(positions=layer.positions - 1) for layer in blank.cache)
    one = {name: getattr(blank, name) + 1 for name in ("lengths", "prompt_lengths")}
    return blank._replace(**one, limits=blank.limits + room, settings=settings, cache=cache)


def _decode(
    program: Any, params: Any, shapes: engine.DecodeState, case: Decoding, timed: float
) -> Row:
    room, before = shapes.tokens.shape[1], peak_memory()
    state = _empty(shapes, room)
    # Rows of the table of positions are looked up; of all else every byte is read.
    read = {name: leaf for name, leaf in params.items() if name != "wpe"}
    moved = tree_bytes((read, state.cache), tiled=False)
    held = tree_bytes((params, state), tiled=False)

    def append(steps: int) -> float:
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(program(params, state, jnp.int32(steps)))
        return (time.perf_counter() - start) / steps

    append(1)
    steps = max(1, min(int(timed / append(4)), (room - 8) // _REPEATS))
    seconds = statistics.median(append(steps) for _ in range(_REPEATS))
    planned = _planned(program)
    return {
        "model": case.model,
        "weights": case.weights,
        "batch": case.batch,
        "room": room,
        "seconds": seconds,
        "tokens_per_second": case.batch / seconds,
        "bytes_per_second": moved / seconds,
    } | _memory(before, held, planned)


def start_prefill(sizes: Sizes, wanted: Sequence[str], at_once: int) -> Callable[[str], Row]:
    """Returns what gives the row of a model; all programs are compiled before."""
    programs = prepare(functools.partial(_compile_prefill, sizes), wanted, at_once, done=True)
    batch, length = sizes.prefill

    def measure(name: str) -> Row:
        program, arguments, flops = programs(name)
        params = draw(arguments[0])
        seconds = _median_seconds(lambda: program(params, *arguments[1:]), sizes.seconds)
        return {
            "model": name,
            "batch": batch,
            "length": length,
            "seconds": seconds,
            "tokens_per_second": batch * length / seconds,
            "flops_per_second": flops / seconds,
        }

    return measure


def _compile_prefill(sizes: Sizes, name: str) -> tuple[Any, Any, float]:
    """Returns the program, what it takes (of parameters the shapes) and its FLOPs."""
    config, (batch, length) = sizes.models[name], sizes.prefill
    model = Neo(config, jnp.bfloat16)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)
    lengths = np.full(batch, length, np.int32)
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * batch)
    arguments = (_weight_shapes(model), tokens, lengths, lengths, settings)
    program = engine.prefill.lower(model, length, *arguments).compile()
    # Of kernels for one kind of device the trace does not show the products.
    counted = engine.prefill.trace(model.clone(kernel="blocked"), length, *arguments)
    return program, arguments, traced_flops(counted, config)


def start_training(sizes: Sizes, wanted: Sequence[str], at_once: int) -> Callable[[str], Row]:
    """Returns what gives the row of a model: of the first batch that fits."""

    def measure(name: str) -> Row:
        refused = []
        for batch, remat in sizes.training[name]:
            config = TrainConfig(
                data="", output="", steps=1000, batch_size=batch, model=sizes.models[name],
                length=sizes.length, remat=remat,
            )  # fmt: skip
            try:
                return {"model": name, "refused": refused} | _train(config, sizes.seconds)
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                refused.append(f"{batch} x {sizes.length}, {remat}: {str(error)[:80]}")
        raise MemoryError("; ".join(refused))

    return measure


def _train(config: TrainConfig, timed: float) -> Row:
    model, optimizer = Neo(config.model, jnp.bfloat16), make_optimizer(config.optimizer, 1000)
    shapes, (batch, _) = abstract_state(model, optimizer), abstract_inputs(config, model)
    start = time.perf_counter()
    program = make_step(model, optimizer, config).lower(shapes, batch).compile()
    compiling, planned = time.perf_counter() - start, _planned(program)
    if planned > device_memory():
        raise MemoryError(f"{planned / 1e9:.1f} GB of {device_memory() / 1e9:.1f} GB")
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.model.vocab_size, batch.tokens.shape, np.int32)
    data = Batch(jnp.asarray(tokens), jnp.ones(batch.weights.shape, jnp.float32))
    state, before = state_of(draw(shapes.params), optimizer), peak_memory()

    def advance() -> Any:
        nonlocal state
        state, metrics = program(state, data)
        return metrics

    seconds, loss = _median_seconds(advance, timed), float(advance()["loss"])
    in_step = config.batch_size * config.sequence_length
    flops = in_step * flops_per_token(config.model, config.sequence_length)
    row: Row = {
        "batch": config.batch_size,
        "length": config.sequence_length,
        "remat": config.remat,
        "seconds": seconds,
        "tokens_per_second": in_step / seconds,
        "flops_per_second": flops / seconds,
        "compile_seconds": compiling,
        "loss": loss,
    } | _memory(before, tree_bytes((shapes, batch), tiled=False), planned)
    return row if np.isfinite(loss) else row | {"failed": f"a loss of {loss}"}


def _weight_shapes(model: Neo) -> Any:
    shapes = param_shapes(model)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, model.dtype), shapes)


def _median_seconds(run: Callable[[], Any], timed: float) -> float:
    """Returns the seconds of one of several runs that follow each other without a wait."""
    jax.block_until_ready(run())
    start = time.perf_counter()
    jax.block_until_ready(run())
    count = max(1, int(timed / (time.perf_counter() - start)))
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in range(count):
            last = run()
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


def _planned(program: Any) -> int:
    """Returns the most bytes that a program needs at a time, as `plan` has them of the compiler."""
    told = program.memory_analysis()
    new = told.output_size_in_bytes - told.alias_size_in_bytes
    return (
        told.argument_size_in_bytes
        + told.temp_size_in_bytes
        + new
        + told.generated_code_size_in_bytes
    )


def _memory(before: float, held: int, planned: int) -> Row:
    """Returns bytes: of arrays by arithmetic, planned, and the peak where this row has set it."""
    peak = peak_memory()
    set_here = jax.default_backend() != "cpu" and peak > before
    return {"held_bytes": held, "planned_bytes": planned, "peak_bytes": peak if set_here else None}
