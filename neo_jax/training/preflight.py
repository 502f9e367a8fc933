"""What is known of a run before it begins: whether its step can be, and whether it fits."""

from typing import Any

import jax

from neo_jax.axes import BATCH, Params
from neo_jax.devices.memory import check_batch, device_memory, tree_bytes
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.training.config import TrainConfig
from neo_jax.training.step import Step, TrainState


def check_run(
    config: TrainConfig,
    model: Neo,
    step: Step,
    state: TrainState,
    batch: Any,
    frozen: Params | None,
) -> None:
    """Checks what would else be an error of the first step, the output folder made by then.

    `state` is what `abstract_state` returns, `batch` and `frozen` what `abstract_inputs` does.

    Raises:
      NeoError: parts of a batch do not divide over the mesh, the strategy contradicts itself at
        some activation, or the state is larger than the memory of its devices.
    """
    shards = model.sharding.num_shards(BATCH) if model.sharding else 1
    if config.batch_size % (config.accumulation * shards):
        raise NeoError(
            f"a batch of {config.batch_size} in accumulation {config.accumulation} parts does not "
            f"divide over {shards} devices; make batch_size a multiple of "
            f"{config.accumulation * shards}, or accumulation smaller."
        )
    jax.eval_shape(step, state, batch, frozen)
    # What every step holds at once, whatever its activations, gradients included.
    needed, memory = tree_bytes((state, state.params, frozen)), device_memory()
    if needed > memory:
        raise NeoError(
            f"weights, gradients and optimizer take {needed / 1e9:.3g} GB of each device, which "
            f"has {memory / 1e9:.3g} GB; split them over more devices along fsdp (--mesh fsdp=-1), "
            "or choose --optimizer.name adafactor, or adapters (--lora.rank 8)."
        )


def check_size(config: TrainConfig, model: Neo) -> None:
    """Checks that a batch is not beyond all measure; what a step takes in full, the compiler knows.

    Raises:
      NeoError: the residual stream alone, once, is larger than the memory of the devices.
    """
    length = config.sequence_length
    num_devices = model.sharding.mesh.size if model.sharding else 1
    stream = 4 * length * config.model.embed_dim
    check_batch(config.batch_size // config.accumulation, length, stream, num_devices)
