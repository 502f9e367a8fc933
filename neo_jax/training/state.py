"""The state of training, and the pure step from one state to the next."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from neo_jax.axes import Array, Params
from neo_jax.model import Neo, init_params, logical_axes
from neo_jax.sharding import tree_shardings
from neo_jax.training.loss import Batch, mean_loss


class TrainState(NamedTuple):
    """Everything a run needs to go on from a step, the data's position included: it is the step."""

    step: Array  # int32 scalar: steps done
    params: Params  # float32
    opt_state: Any  # what optax keeps


Metrics = dict[str, Array]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def init_state(model: Neo, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Draws a state; each array is created where it lives, never whole on one host."""
    init = functools.partial(_init, model, optimizer)
    shardings = state_shardings(model, optimizer, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_state(model: Neo, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the shape, dtype and place of every leaf of a state, as `ShapeDtypeStruct`s."""
    shapes = jax.eval_shape(functools.partial(_init, model, optimizer), jax.random.key(0))
    shardings = state_shardings(model, optimizer, shapes)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: here, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def _init(model: Neo, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    params = init_params(model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(
    model: Neo, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState | None:
    """Returns where each leaf of a state lives; None on one device.

    An optimizer slot lies as its parameter does; counters are everywhere.
    """
    sharding = model.sharding
    if sharding is None:
        return None
    params = tree_shardings(sharding, logical_axes(model), state.params)
    replicated = sharding.named((), ())
    slots = optax.tree.map_params(
        optimizer,
        lambda _, named: named,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, slots)  # type: ignore[arg-type]  # shardings in the place of arrays


def make_step(
    model: Neo, optimizer: optax.GradientTransformation, schedule: optax.Schedule
) -> Step:
    """Returns the jitted training step; it consumes the state that it is given.

    Metrics are scalars: loss (nats a token), gradient_norm (before clipping), learning_rate.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, grads = jax.value_and_grad(lambda params: mean_loss(model, params, batch))(
            state.params
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step)),
        }
        state = TrainState(state.step + 1, params, opt_state)
        shardings = state_shardings(model, optimizer, state)
        if shardings is not None:  # else the compiler may choose another place
            state = jax.lax.with_sharding_constraint(state, shardings)
        return state, metrics

    return jax.jit(step, donate_argnums=0)
