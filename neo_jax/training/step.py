"""The state of training, and the pure step from one state to the next."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from neo_jax.axes import BATCH, Array, Params
from neo_jax.data.features import open_features
from neo_jax.errors import NeoError
from neo_jax.model.scan import abstract_params, stack, stacked_axes, stacked_shapes
from neo_jax.model.soft_prompt import without_prompt
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import tuning
from neo_jax.ops.matmul import settled
from neo_jax.sharding.rules import Sharding, tree_shardings
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives import Objective, Sums
from neo_jax.training.objectives.classification import Classification
from neo_jax.training.objectives.next_token import NextToken
from neo_jax.training.objectives.soft_prompt import MappedPrefix, SoftPrompt
from neo_jax.training.objectives.tokens import QuestionAnswering, TokenClassification
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

_OF_HEADS: dict[str, type[Classification]] = {
    "score": Classification,
    "classifier": TokenClassification,
    "qa_outputs": QuestionAnswering,
}
_ALL_WEIGHTS = LoraConfig()
_LANGUAGE: Objective = NextToken()


def init_state(
    model: Neo,
    optimizer: optax.GradientTransformation,
    seed: int,
    lora: LoraConfig = _ALL_WEIGHTS,
    objective: Objective = _LANGUAGE,
) -> TrainState:
    """Draws a state; each array is created where it lives, never whole on one host."""

    def init(key: Array) -> TrainState:
        return state_of(_init_params(model, lora, objective, key), optimizer)

    shardings = state_shardings(model, optimizer, _state_shapes(model, optimizer, lora, objective))
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def abstract_state(
    model: Neo,
    optimizer: optax.GradientTransformation,
    lora: LoraConfig = _ALL_WEIGHTS,
    objective: Objective = _LANGUAGE,
) -> TrainState:
    """Returns the shape, dtype and place of every leaf of a state, each a `ShapeDtypeStruct`."""
    shapes = _state_shapes(model, optimizer, lora, objective)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    everything_here = jax.tree.map(lambda _: here, shapes)
    shardings = state_shardings(model, optimizer, shapes) or everything_here
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings,
    )


def make_model(config: TrainConfig, sharding: Sharding | None) -> Neo:
    """Returns the model of a run."""
    count = config.soft_prompt.shared
    return Neo(
        config.model, jnp.dtype(config.dtype), config.kernel, sharding, config.dropout,
        virtual_tokens=count, soft_prompt=count,
    )  # fmt: skip


def make_objective(config: TrainConfig) -> Objective:
    """Returns what a run minimises."""
    head = config.model.head
    soft = config.soft_prompt
    if soft.features:
        return MappedPrefix(config.z_loss, open_features(soft.features).shape[1], soft)
    if soft.tokens:
        return SoftPrompt(config.z_loss)
    return _OF_HEADS[head.kind](head) if head.is_classifier else NextToken(config.z_loss)


def abstract_inputs(
    config: TrainConfig,
    model: Neo,
    has_segment_starts: bool = False,
    objective: Objective = _LANGUAGE,
) -> tuple[Any, Params | None]:
    """Returns a batch, and where adapters are trained the frozen parameters, else None.

    Each leaf is a `ShapeDtypeStruct` with its place; `has_segment_starts` says whether batches say
    where documents begin.
    """

    def place(leaf: Any) -> Any:
        sharding, rows = model.sharding, (BATCH, *[None] * (len(leaf.shape) - 1))
        named = sharding.named(rows, leaf.shape, "batch") if sharding else None
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=named)

    spec = objective.batch_spec(config.batch_size, config.sequence_length, has_segment_starts)
    if not config.is_frozen:
        return jax.tree.map(place, spec), None
    return jax.tree.map(place, spec), abstract_params(without_prompt(model), model.dtype)


def state_of(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state of a run that starts from stacked parameters, or from adapters.

    Raises:
      NeoError: parameters are int8.
    """
    if not all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(params)):
        raise NeoError("int8 weights cannot be trained; start from the model of floats.")
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, optimizer.init(params), jnp.zeros(2, jnp.int32))


def _init_params(
    model: Neo, lora: LoraConfig, objective: Objective, key: Array, of_model: Params | None = None
) -> Params:
    """Draws what is trained, or takes the model's own parameters as they are given."""
    if isinstance(objective, SoftPrompt):  # of a model that is frozen
        params: Params = {}
    elif lora.rank:
        params = init_adapters(model.config, lora, key)
    else:
        params = of_model or stack(init_params(model, key), model.config)
    return params | objective.init(model, jax.random.fold_in(key, 1))


def _state_shapes(
    model: Neo, optimizer: optax.GradientTransformation, lora: LoraConfig, objective: Objective
) -> TrainState:
    """Returns the shapes of a first state; a model's own need no trace of it."""

    def state(key: Array, of_model: Params) -> TrainState:
        return state_of(_init_params(model, lora, objective, key, of_model), optimizer)

    return jax.eval_shape(state, jax.random.key(0), stacked_shapes(model))


def merge_trainable(params: Params, frozen: Params | None, lora: LoraConfig) -> Params:
    """Returns the stacked tree that the model takes: what is trained, in its place in the rest."""
    if frozen is None:
        return params
    adapters = {name: tree for name, tree in params.items() if name in frozen}
    return params | (add_adapters(frozen, adapters, lora.scale) if adapters else frozen)


def state_shardings(
    model: Neo, optimizer: optax.GradientTransformation, state: TrainState
) -> TrainState | None:
    """Returns where each leaf of a state lives; None on one device.

    An optimizer slot of a parameter's shape is laid out as the parameter is; counters, and the
    vectors that Adafactor keeps in the place of a matrix, are everywhere.
    """
    sharding = model.sharding
    if sharding is None:
        return None
    axes = stacked_axes(model)
    replicated = sharding.named((), ())
    of_model = {name: tree for name, tree in state.params.items() if name in axes}
    of_objective = {name: tree for name, tree in state.params.items() if name not in axes}
    params = tree_shardings(sharding, adapter_axes(of_model, axes), of_model)
    params |= jax.tree.map(lambda _: replicated, of_objective)
    slots = optax.tree.map_params(
        optimizer,
        lambda slot, param, place: place if slot.shape == param.shape else replicated,
        state.opt_state,
        state.params,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, slots, replicated)  # type: ignore[arg-type]  # not arrays


def make_step(
    model: Neo,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    objective: Objective | None = None,
) -> Step:
    """Returns the jitted training step of a run; it consumes the state that it is given.

    It takes a state, a batch and, where adapters are trained, the frozen stacked parameters. These
    get no gradient. It minimises `objective`, or what the config says.

    A step whose gradients are not finite changes nothing but the counters; the learning rate
    follows the step, such steps included. Metrics are scalars:
    loss (what the objective reports, as nats a token), gradient_norm (before clipping),
    learning_rate, skipped (steps so far) and skipped_in_a_row.
    """
    schedule = make_schedule(config.optimizer, config.steps)
    objective = objective or make_objective(config)
    update = optax.with_extra_args_support(optimizer).update

    def step(
        state: TrainState, batch: Any, frozen: Params | None = None
    ) -> tuple[TrainState, Metrics]:
        sums, grads = _gradients(model, config, objective, state, batch, frozen)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm)
        slots = _at_step(state.opt_state, state.step)
        updates, opt_state = update(grads, slots, state.params, finite=finite)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = jnp.where(finite, state.skipped * jnp.array([1, 0]), state.skipped + 1)
        metrics = {
            "loss": sums.loss / sums.weight,
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
    model: Neo,
    config: TrainConfig,
    objective: Objective,
    state: TrainState,
    batch: Any,
    frozen: Params | None,
) -> tuple[Sums, Params]:
    """Returns the sums of a batch and the gradients of its mean objective."""
    key = jax.random.fold_in(jax.random.key(config.seed), state.step) if model.dropout else None
    unroll = config.unroll or tuning.unroll(model.sharding, config.model.num_layers, config.remat)

    def embedded(params: Params) -> Any:
        return objective.embed(model, merge_trainable(params, frozen, config.lora), batch, key)

    def loss(params: Params, x: Any, part: Any, number: Array) -> tuple[Array, Sums]:
        sums = objective.loss(
            model,
            merge_trainable(params, frozen, config.lora),
            part,
            embedded=x,
            remat=config.remat,
            unroll=unroll,
            key=None if key is None else jax.random.fold_in(key, number),
        )
        return sums.objective, sums

    if config.accumulation == 1:
        one = functools.partial(loss, x=None, part=batch, number=jnp.int32(0))
        grads, sums = jax.grad(one, has_aux=True)(state.params)
    else:
        # Of the embedding outside of the loop: a TPU's compiler sums wrongly what a loop scatters
        # over a split table (openxla/xla issue 49143).
        x, pull = jax.vjp(embedded, state.params)
        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        zeros = jax.tree.map(jnp.zeros_like, (state.params, Sums(*[jnp.zeros(())] * 3)))

        def add(totals: Any, part: tuple[Any, Any, Array]) -> tuple[Any, Any]:
            (grads, grad_x), sums = gradient(state.params, *part)
            return jax.tree.map(jnp.add, totals, (grads, sums)), grad_x

        parts = (*_parts((x, batch), config.accumulation), jnp.arange(config.accumulation))
        (grads, sums), grads_x = jax.lax.scan(add, zeros, parts)
        grads = jax.tree.map(jnp.add, grads, *pull(_joined(grads_x)))
    weight = jnp.maximum(sums.weight, 1)
    return sums._replace(weight=weight), settled(jax.tree.map(lambda grad: grad / weight, grads))


def _parts(batch: Any, count: int) -> Any:
    """Cuts a tree of batches into parts, a new first axis; each has some rows of every device."""

    def cut(x: Array) -> Array:
        return jnp.moveaxis(x.reshape((-1, count, *x.shape[1:])), 1, 0)

    return jax.tree.map(cut, batch)


def _joined(parts: Any) -> Any:
    """Undoes `_parts`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape((-1, *x.shape[2:])), parts)
