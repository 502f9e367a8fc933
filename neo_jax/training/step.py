"""The state of training, and the pure step from one state to the next."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from neo_jax.axes import BATCH, Array, Params
from neo_jax.errors import NeoError
from neo_jax.model.scan import abstract_params, stack, stacked_axes
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import device_of, tree_shardings
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives.cross_entropy import Batch, Losses, batch_losses, embed_inputs
from neo_jax.training.optimizer import make_schedule
from neo_jax.transforms.lora import LoraConfig, adapter_axes, add_adapters, init_adapters


class TrainState(NamedTuple):
    """Everything a run needs to go on from a step.

    The data's position is in it, and so is all randomness: both are functions of seed and step.
    """

    step: Array  # int32 scalar: steps done, skipped ones included
    params: Params  # what is trained, stacked, float32: all weights, or adapters
    opt_state: Any  # what optax keeps
    skipped: Array  # int32 [2]: steps without finite gradients, in all and in a row to the last


Metrics = dict[str, Array]
Step = jax.stages.Wrapped  # from a state and a batch to a state and metrics

_ALL_WEIGHTS = LoraConfig()


def init_state(
    model: Neo,
    optimizer: optax.GradientTransformation,
    seed: int,
    lora: LoraConfig = _ALL_WEIGHTS,
) -> TrainState:
    """Draws a state; each array is created where it lives, never whole on one host."""
    init = functools.partial(_init, model, optimizer, lora)
    shardings = state_shardings(model, optimizer, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_state(
    model: Neo, optimizer: optax.GradientTransformation, lora: LoraConfig = _ALL_WEIGHTS
) -> TrainState:
    """Returns the shape, dtype and place of every leaf of a state, as `ShapeDtypeStruct`s."""
    shapes = jax.eval_shape(functools.partial(_init, model, optimizer, lora), jax.random.key(0))
    shardings = state_shardings(model, optimizer, shapes)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def abstract_inputs(
    config: TrainConfig, model: Neo, has_segment_starts: bool = False
) -> tuple[Batch, Params | None]:
    """Returns what a step takes beside the state, as `ShapeDtypeStruct`s.

    Args:
      config: of the run.
      model: its model, with the strategy.
      has_segment_starts: whether batches tell where documents begin.

    Returns:
      A batch, and the frozen parameters where adapters are trained, else None.
    """

    def rows(length: int, dtype: DTypeLike) -> Any:
        shape, sharding = (config.batch_size, length), model.sharding
        place = sharding.named((BATCH, None), shape, "batch") if sharding else None
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    length = config.sequence_length
    segment_starts = rows(length, jnp.int32) if has_segment_starts else None
    batch = Batch(rows(length + 1, jnp.int32), rows(length, jnp.float32), segment_starts)
    return batch, abstract_params(model, jnp.dtype(config.dtype)) if config.lora.rank else None


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run that starts from stacked parameters, or from adapters.

    Raises:
      NeoError: parameters are int8.
    """
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)):
        raise NeoError("int8 weights cannot be trained; start from the model of floats.")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), jnp.zeros(2, jnp.int32))


def _init(
    model: Neo, optimizer: optax.GradientTransformation, lora: LoraConfig, key: Array
) -> TrainState:
    if lora.rank:
        return state_of(init_adapters(model.config, lora, key), optimizer)
    return state_of(stack(init_params(model, key), model.config), optimizer)


def whole(params: Params, frozen: Params | None, lora: LoraConfig) -> Params:
    """Returns the stacked tree that the model takes: what is trained, in its place in the rest."""
    return params if frozen is None else add_adapters(frozen, params, lora.scale)


def state_shardings(
    model: Neo, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState | None:
    """Returns where each leaf of a state lives; None on one device.

    An optimizer slot of a parameter's shape lies as the parameter does; counters, and the vectors
    that Adafactor keeps in the place of a matrix, are everywhere.
    """
    sharding = model.sharding
    if sharding is None:
        return None
    axes = adapter_axes(state.params, stacked_axes(model))
    params = tree_shardings(sharding, axes, state.params)
    replicated = sharding.named((), ())
    slots = optax.tree.map_params(
        optimizer,
        lambda slot, param, place: place if slot.shape == param.shape else replicated,
        state.opt_state,
        state.params,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, slots, replicated)  # type: ignore[arg-type]  # not arrays


def make_step(model: Neo, optimizer: optax.GradientTransformation, config: TrainConfig) -> Step:
    """Returns the jitted training step of a run; it consumes the state that it is given.

    It takes a state, a batch and, where adapters are trained, the frozen stacked parameters. These
    get no gradient.

    A step whose gradients are not finite changes nothing but the counters; the learning rate
    follows the step, such steps included. Metrics are scalars:
    loss (nats a token), gradient_norm (before clipping), learning_rate, skipped (steps so far) and
    skipped_in_a_row.
    """
    schedule = make_schedule(config.optimizer, config.steps)

    def step(
        state: TrainState, batch: Batch, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        losses, grads = _gradients(model, config, state, batch, frozen)
        norm = optax.tree.norm(grads)
        slots = _at_step(state.opt_state, state.step)
        updates, opt_state = optimizer.update(grads, slots, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = jnp.where(finite, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        metrics = {
            "loss": losses.cross_entropy / losses.weight,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(schedule(state.step)),
            "skipped": skipped[0],
            "skipped_in_a_row": skipped[1],
        }
        state = TrainState(state.step + 1, params, opt_state, skipped)
        shardings = state_shardings(model, optimizer, state)
        if shardings is not None:  # else the compiler may choose another place
            state = jax.lax.with_sharding_constraint(state, shardings)
        return state, metrics

    return jax.jit(step, donate_argnums=0)


def _at_step(opt_state: Any, step: Array) -> Any:
    """Returns what optax keeps, with the schedules at a step of the run.

    optax's own count lacks the steps that were skipped. It is alone in what a schedule keeps.
    """

    def is_schedule(node: Any) -> bool:
        return getattr(node, "_fields", None) == ("count",)

    return jax.tree.map(
        lambda node: node._replace(count=step) if is_schedule(node) else node,
        opt_state,
        is_leaf=is_schedule,
    )


def _gradients(
    model: Neo, config: TrainConfig, state: TrainState, batch: Batch, frozen: Params | None
) -> tuple[Losses, Params]:
    """Returns the losses of a batch and the gradients of its mean objective."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step) if model.dropout else None
    unroll = config.unroll or _fastest_unroll(config, model)

    def embedded(params: Params) -> Array:
        return embed_inputs(model, whole(params, frozen, config.lora), batch, key)

    def objective(
        params: Params, x: Array | None, part: Batch, number: Array
    ) -> tuple[Array, Losses]:
        part_key = None if key is None else jax.random.fold_in(key, number)
        losses = batch_losses(
            model,
            whole(params, frozen, config.lora),
            part,
            remat=config.remat,
            unroll=unroll,
            z_loss=config.z_loss,
            key=part_key,
            embedded=x,
        )
        return losses.objective, losses

    if config.accumulation == 1:
        one = functools.partial(objective, x=None, part=batch, number=jnp.int32(0))
        grads, losses = jax.grad(one, has_aux=True)(state.params)
    else:
        # Of the embedding outside of the loop: a TPU's compiler sums wrongly what a loop scatters
        # over a split table (openxla/xla issue 49143).
        x, pull = jax.vjp(embedded, state.params)
        gradient = jax.grad(objective, argnums=(0, 1), has_aux=True)
        zeros = jax.tree.map(jnp.zeros_like, (state.params, Losses(*[jnp.zeros(())] * 3)))

        def add(sums: Any, part: tuple[Array, Batch, Array]) -> tuple[Any, Array]:
            (grads, grad_x), losses = gradient(state.params, *part)
            return jax.tree.map(jnp.add, sums, (grads, losses)), grad_x

        parts = (*_parts((x, batch), config.accumulation), jnp.arange(config.accumulation))
        (grads, losses), grads_x = jax.lax.scan(add, zeros, parts)
        grads = jax.tree.map(jnp.add, grads, *pull(_joined(grads_x)))
    weight = jnp.maximum(losses.weight, 1)
    return losses._replace(weight=weight), jax.tree.map(lambda grad: grad / weight, grads)


def _fastest_unroll(config: TrainConfig, model: Neo) -> int:
    """Returns how many units of layers to write out: on a CPU a loop copies what it carries.

    What is computed again would there be found to be the same without a loop, and be kept.
    """
    on_cpu = device_of(model.sharding).platform == "cpu"
    return config.model.num_layers if on_cpu and config.remat == "none" else 1


def _parts(batch: Any, count: int) -> Any:
    """Cuts a tree of batches into parts, a new first axis; each has some rows of every device."""

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape((-1, count, *x.shape[1:])), 1, 0)

    return jax.tree.map(cut, batch)


def _joined(parts: Array) -> Array:
    """Undoes `_parts` for an array."""
    return jnp.moveaxis(parts, 0, 1).reshape((-1, *parts.shape[2:]))
