"""The optimizer of a config, by optax."""

import jax
import optax

from neo_jax.axes import Params
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
        optimizer = optax.adamw(
            schedule, b1=config.beta1, b2=config.beta2, eps=config.epsilon, **decay
        )
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


def _decays(params: Params) -> Params:
    """Marks what weight decay acts on: kernels, adapters of kernels, and embeddings."""
    decayed = {"kernel", "embedding"}
    return jax.tree.map_with_path(
        lambda path, _: not decayed.isdisjoint(entry.key for entry in path), params
    )
