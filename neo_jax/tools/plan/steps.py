"""The true steps, training, prefill and decoding, with arguments that are shapes and places.

What a strategy cannot split, of a model or a batch, is a `NeoError`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from neo_jax.axes import BATCH
from neo_jax.checkpoints.options import Quantize
from neo_jax.decode import engine
from neo_jax.decode.capacity import LENGTH_UNIT, row_sizes
from neo_jax.decode.options import ROOM, Room, SamplingOptions, make_settings
from neo_jax.decode.state import Entering, empty_state, insert_read
from neo_jax.devices.memory import tree_bytes
from neo_jax.model import cache as caching
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.transformer import Neo
from neo_jax.ops.tuning import tpu_layout
from neo_jax.serving.jobs import CHUNK
from neo_jax.serving.protocol import MOST_BIASES
from neo_jax.sharding.rules import Sharding, padded_rows, tree_shardings
from neo_jax.training.config import TrainConfig
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import (
    abstract_inputs,
    abstract_state,
    make_model,
    make_objective,
    make_step,
)
from neo_jax.transforms.quantize import quantized_shapes

Kind = Literal["train", "prefill", "decode", "serve"]

OPEN_TRIPS = 1
"""How often the one loop of data-dependent length runs: decoding, where a trip is a token."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that can be traced, lowered and compiled, and what it takes."""

    kind: Kind
    model: Neo
    rows: int  # sequences that are worked on at a time, on all devices
    length: int  # of each
    parts: dict[str, Any]  # its arguments by what they are: each leaf a `ShapeDtypeStruct`
    tokens: int  # that go through the model in a step
    trace: Callable[[], jax.stages.Traced]
    trace_useful: Callable[[], jax.stages.Traced]  # the same without computing anything again
    trains: str = ""  # what is trained, in words
    # what there is on the devices next to the arguments: trees like those of `parts`
    beside: dict[str, Any] = dataclasses.field(default_factory=dict)
    # and for a moment between two steps, when the temporaries of the step are not there
    between: Any = ()
    trace_between: Callable[[], jax.stages.Traced] | None = None  # what may be begun meanwhile

    @property
    def sharding(self) -> Sharding:
        """The strategy."""
        assert self.model.sharding is not None
        return self.model.sharding

    @property
    def mesh(self) -> Mesh:
        """The devices, as the strategy has them."""
        assert isinstance(self.sharding.mesh, Mesh)
        return self.sharding.mesh

    def part_bytes(self, tiled: bool) -> dict[str, int]:
        """Returns what a device holds of each part; see `tree_bytes`."""
        return {name: tree_bytes(tree, tiled) for name, tree in self.parts.items()}


def training_step(config: TrainConfig, sharding: Sharding) -> Step:
    """Returns the step that `train` runs."""
    model = make_model(config, sharding)
    optimizer = make_optimizer(config.optimizer, config.steps)
    objective = make_objective(config)
    state = abstract_state(model, optimizer, config.lora, objective)
    batch, frozen = abstract_inputs(config, model, objective=objective)

    def trace(config: TrainConfig) -> jax.stages.Traced:
        return make_step(model, optimizer, config, objective).trace(state, batch, frozen)

    whole = useful = functools.partial(trace, config)
    if config.remat != "none":
        useful = functools.partial(trace, dataclasses.replace(config, remat="none"))
    return Step(
        "train",
        model,
        config.batch_size // config.accumulation,
        config.sequence_length,
        {
            "parameters": (state.params, frozen),
            "optimizer": (state.opt_state, state.step, state.skipped),
            "batch": batch,
        },
        config.batch_size * config.sequence_length,
        whole,
        useful,
        _trained(config),
    )


def _trained(config: TrainConfig) -> str:
    """Returns in words what a config trains."""
    model = config.model.head.words
    if config.lora.rank:
        return f"adapters of rank {config.lora.rank} of {model}"
    if config.soft_prompt.tokens:
        return f"{config.soft_prompt.tokens} virtual tokens before the texts of {model}"
    return model


def prefill_step(model: Neo, batch: int, length: int, quantize: Quantize = "none") -> Step:
    """Returns the step that reads prompts of `length` tokens, with room for no more."""
    params, *rows = arguments = _prefill_arguments(model, batch, length, quantize)
    trace = functools.partial(engine.prefill.trace, model, length, *arguments)
    parts = {"parameters": params, "cache": (), "batch": rows}
    return Step("prefill", model, batch, length, parts, batch * length, trace, trace)


def decode_step(model: Neo, batch: int, length: int, quantize: Quantize = "none") -> Step:
    """Returns the step that appends a token to each of `batch` texts of up to `length` tokens."""
    params = _prefill_arguments(model, 1, 1, quantize)[0]
    state, steps = _empty(model, batch, length, ROOM), jax.ShapeDtypeStruct((), jnp.int32)
    trace = functools.partial(engine.run.on(model).trace, model, params, state, steps)
    rows = (state._replace(cache=()), steps)
    parts = {"parameters": params, "cache": state.cache, "batch": rows}
    return Step("decode", model, batch, length, parts, batch, trace, trace)


def serve_step(
    model: Neo, batch: int, length: int, quantize: Quantize = "none", num_alternatives: int = 20
) -> Step:
    """Returns the step of a server that writes `batch` texts of up to `length` tokens.

    Next to it is the cache of the prompts that are being read; and when the batch takes another
    number of rows, or longer texts, both are there for a moment.
    """
    room = Room(biases=MOST_BIASES, alternatives=min(num_alternatives, model.config.vocab_size))
    params = _prefill_arguments(model, 1, 1, quantize)[0]

    sizes = sorted({padded_rows(model.sharding, size) for size in row_sizes(batch)})
    smaller = [_empty(model, rows, length, room) for rows in sizes[-2:-1]]
    shorter = [_empty(model, sizes[-1], length // 2, room)] if length > 2 * LENGTH_UNIT else []
    between = max(smaller + shorter, key=lambda state: tree_bytes(state, False), default=())

    context = model.config.max_length
    chunk = min(CHUNK, context)
    prompt = jax.ShapeDtypeStruct((padded_rows(model.sharding, 1), chunk), jnp.int32)
    slack = caching.slack_for(model.config, model.sharding, chunk)
    held = (model.config, prompt.shape[0], context, model.dtype, slack)
    reading = _placed_cache(model, jax.eval_shape(lambda: caching.empty(*held)))

    state, number = _empty(model, sizes[-1], length, room), jax.ShapeDtypeStruct((), jnp.int32)
    trace = functools.partial(engine.run.on(model).trace, model, params, state, number, number)
    rows = (state._replace(cache=()), number, number)
    return Step(
        "serve",
        model,
        sizes[-1],
        length,
        {"parameters": params, "cache": state.cache, "batch": rows},
        sizes[-1],
        trace,
        trace,
        beside={"prompts being read": reading},
        between=between,
        trace_between=functools.partial(_trace_insertion, model, state, prompt, reading),
    )


def _trace_insertion(
    model: Neo, state: engine.DecodeState, prompt: Any, reading: Any
) -> jax.stages.Traced:
    """Traces what puts prompts that have been read into the rows of a server."""
    lengths = jax.ShapeDtypeStruct(prompt.shape[:1], jnp.int32)
    rows: Any = jax.ShapeDtypeStruct(state.limits.shape, jnp.int32)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32)
    settings = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.settings)
    tokens = jax.ShapeDtypeStruct((prompt.shape[0], model.config.max_length), jnp.int32)
    entering = Entering(rows, rows, count, rows, settings)
    return insert_read.trace(model, state, tokens, lengths, reading, entering)


def _prefill_arguments(model: Neo, batch: int, length: int, quantize: Quantize) -> tuple[Any, ...]:
    assert model.sharding is not None
    if quantize == "int8":
        params = quantized_shapes(model.config, model.dtype, model.sharding)
    else:
        shapes = param_shapes(model)
        axes = logical_axes(model)
        params = jax.tree.map(
            lambda leaf, place, axes: jax.ShapeDtypeStruct(
                leaf.shape, model.dtype, sharding=tpu_layout(place, axes)
            ),
            shapes,
            tree_shardings(model.sharding, axes, shapes),
            axes,
        )
    rows = jax.ShapeDtypeStruct((batch,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    settings = jax.eval_shape(lambda: make_settings(SamplingOptions(), [0] * batch))
    return params, tokens, rows, rows, settings


def _empty(model: Neo, rows: int, slots: int, room: Room) -> engine.DecodeState:
    """Returns the shapes of a decoding state with the places of its leaves."""
    return _placed(model, jax.eval_shape(lambda: empty_state(model, rows, slots, room)))


def _placed_cache(model: Neo, cache: Any) -> Any:
    """Returns a cache's shapes with the places of its leaves."""
    return _placed(model, _Cached(cache)).cache


class _Cached(NamedTuple):
    cache: Any


def _placed(model: Neo, state: Any) -> Any:
    """Returns a state's shapes with the places that prefill gives its leaves."""
    sharding = model.sharding
    assert sharding is not None

    def place(path: Any, leaf: Any) -> Any:
        in_cache = path[0].name == "cache"  # of a layer, as in cache, 3, k
        axes = caching.LOGICAL_AXES[path[2].name] if in_cache else (BATCH, *[None] * leaf.ndim)
        named = sharding.named(axes[: leaf.ndim], leaf.shape, "the decoding state")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)

    return jax.tree.map_with_path(place, state)
