"""The optimizer of a config, by optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from neo_jax.axes import Array, Params
from neo_jax.ops.matmul import settled
from neo_jax.training.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step: a linear warm-up, then a decay."""
    peak, end = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, max(steps - 1, 0))
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps - warmup, config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, steps - warmup),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer behind clipping by the gradient's global norm.

    AdamW: Loshchilov and Hutter, 2019. Adafactor: Shazeer and Stern, 2018. Lion: Chen et al., 2023.
    """
    schedule = make_schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": _decays}
    if config.name == "adamw":
        rate = optax.scale_by_learning_rate(schedule)
        optimizer = optax.chain(_scale_by_adam(config), optax.add_decayed_weights(**decay), rate)
    elif config.name == "lion":
        optimizer = optax.lion(schedule, b1=config.beta1, b2=config.beta2, **decay)
    else:
        optimizer = optax.adafactor(
            schedule,
            multiply_by_parameter_scale=False,
            # As with the others, the decay of a step follows the learning rate.
            weight_decay_rate=lambda step: config.weight_decay * schedule(step),
            weight_decay_mask=_decays,
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, optimizer)


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam`, whose moments CPUs compute once and in their place.

    Else XLA's CPU backend computes them again for the parameters, from copies of the old ones. An
    update takes whether its caller keeps what it returns, and not the old state, as `finite`.
    """
    adam = optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)

    def update(
        grads: Params, state: Any, params: Params | None = None, *, finite: Any = True, **_: Any
    ) -> tuple[Params, Any]:
        new = adam.update(grads, state)[1]
        # The same as the caller's choice, which so is what is computed once.
        kept = settled(jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, state))
        mean = optax.tree.bias_correction(kept.mu, config.beta1, kept.count)
        square = optax.tree.bias_correction(kept.nu, config.beta2, kept.count)

        def scaled(mean: Array, square: Array) -> Array:
            return mean / (jnp.sqrt(square) + config.epsilon)

        return jax.tree.map(scaled, mean, square), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _decays(params: Params) -> Params:
    """Marks what weight decay acts on: kernels, adapters of kernels, and embeddings."""
    decayed = {"kernel", "embedding"}
    return jax.tree.map_with_path(
        lambda path, _: not decayed.isdisjoint(entry.key for entry in path), params
    )
