"""Checkpoints of training: orbax, asynchronous, the newest few kept."""

import dataclasses
import os
from pathlib import Path

import orbax.checkpoint as ocp

from neo_jax.distributed import check_shared
from neo_jax.errors import NeoError, reason
from neo_jax.paths import absolute, check_writable, is_remote, make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of one run, in `folder`. A context manager: leaving it waits for writes."""

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        """Opens the folder, creating it if need be.

        Raises:
          NeoError: the folder cannot be written, or its bucket not be asked about.
        """
        path = absolute(make_path(folder))
        check_writable(path)
        if is_remote(path):
            _check_bucket(path)
        check_shared(path)
        self._manager = ocp.CheckpointManager(
            path, options=ocp.CheckpointManagerOptions(max_to_keep=keep)
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainState, config: TrainConfig) -> None:
        """Starts to write a checkpoint in the background; a step that is there is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        fields = dataclasses.asdict(config)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(fields)
            ),
        )

    def restore_latest(self, abstract: TrainState, config: TrainConfig) -> TrainState | None:
        """Returns the newest checkpoint; None if there is none.

        Args:
          abstract: a ShapeDtypeStruct with a sharding in the place of each array: where the state
            is to live, whatever the devices and the processes that saved it.
          config: what to train.

        Raises:
          NeoError: the run in this folder trains another model.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        ours = {**dataclasses.asdict(config.model)}
        ours["attention_types"] = list(ours["attention_types"])
        if saved.config["model"] != ours:
            raise NeoError(
                "the run in this output folder trains another model; choose another output, or "
                "delete the folder."
            )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return restored.state


def _check_bucket(folder: Path) -> None:
    """Asks about the bucket as orbax will, the first time it removes a checkpoint: hours from now.

    Raises:
      NeoError: the answer is refused.
    """
    from google.cloud import storage

    try:
        storage.Client().get_bucket(str(folder).split("/")[2])
    except Exception as error:  # of several libraries, which share no base
        raise NeoError(
            f"cannot keep checkpoints in {folder} ({reason(error)}); ask for storage.buckets.get, "
            "as in the role Storage Legacy Bucket Reader, beside the right to write objects."
        ) from error
