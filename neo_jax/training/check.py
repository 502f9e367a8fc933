"""What is known of a run before it begins: whether its step can be, and whether it fits."""

import math

import jax

from neo_jax.axes import BATCH, Params
from neo_jax.errors import NeoError
from neo_jax.memory import machine_bytes, tree_bytes
from neo_jax.model import Neo
from neo_jax.training.config import TrainConfig
from neo_jax.training.state import Step, TrainState, abstract_inputs


def check_run(
    config: TrainConfig, model: Neo, step: Step, state: TrainState, has_starts: bool
) -> None:
    """Checks what would else be an error of the first step, the output folder made by then.

    Args:
      config: of the run.
      model: its model, with the strategy.
      step: what `make_step` returned.
      state: the shape, dtype and place of every leaf, as `abstract_state` says.
      has_starts: whether batches tell where documents begin.

    Raises:
      NeoError: parts of a batch do not divide over the mesh, the strategy contradicts itself at
        some activation, or the state is larger than the memory of its devices.
    """
    _check_parts(config, model)
    batch, frozen = abstract_inputs(config, model, has_starts)
    jax.eval_shape(step, state, batch, frozen)
    _check_memory(state, frozen)


def _check_parts(config: TrainConfig, model: Neo) -> None:
    shards = model.sharding.num_shards(BATCH) if model.sharding else 1
    if config.batch_size % (config.accumulation * shards):
        raise NeoError(
            f"a batch of {config.batch_size} in accumulation {config.accumulation} parts does not "
            f"divide over {shards} devices; make batch_size a multiple of "
            f"{config.accumulation * shards}, or accumulation smaller."
        )


def _check_memory(state: TrainState, frozen: Params | None) -> None:
    """Compares what every step holds at once, whatever its activations, with what a device has."""
    tiled = jax.default_backend() == "tpu"
    needed = tree_bytes((state, state.params, frozen), tiled)  # and gradients
    memory = device_memory()
    if needed > memory:
        raise NeoError(
            f"weights, gradients and optimizer take {needed / 1e9:.3g} GB of each device, which "
            f"has {memory / 1e9:.3g} GB; split them over more devices along fsdp (--mesh fsdp=-1), "
            "or choose --optimizer.name adafactor, or adapters (--lora.rank 8)."
        )


def device_memory(num_devices: int = 0) -> float:
    """Returns the bytes that a device of this process has; infinity where that is not known.

    Devices of a CPU have equal shares of the machine's memory: of as many as are told, or all.
    """
    devices = jax.local_devices()
    num_devices = num_devices or len(devices)
    if devices[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices]
        return min(limits)
    return machine_bytes() / num_devices
