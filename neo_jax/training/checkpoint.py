"""Checkpoints of training: orbax, asynchronous; the newest few are kept, and the best.

A checkpoint is a folder named for its step: `state` (its arrays; the step is one of them), and as
JSON `config` (the seed, from which every random key comes, included), `versions` of the libraries,
and `metrics`, the held-out loss where there is one. It appears under that name when it is whole.
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from neo_jax import __version__
from neo_jax.distributed import all_processes, is_leader
from neo_jax.errors import NeoError, reason
from neo_jax.paths import absolute, check_writable, is_remote, make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.state import TrainState

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


class Checkpoints:
    """The checkpoints of one run, in `folder`. A context manager: leaving it waits for writes.

    The best one is named in best.json beside the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2, keep_every: int = 0):
        """Opens the folder, creating it if need be, and removes what a kill left half written.

        Args:
          folder: of the checkpoints of this run and nothing else.
          keep: how many of the newest stay.
          keep_every: steps that are a multiple of this stay too; 0 is none.

        Raises:
          NeoError: the folder cannot be written, or its bucket not be asked about.
        """
        self._folder = absolute(make_path(folder))
        check_writable(self._folder)
        if is_remote(self._folder):
            _check_bucket(self._folder)
        kept: list[Any] = [
            policies.LatestN(keep),
            policies.BestN(
                get_metric_fn=_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
            ),
        ]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=_loss,
            best_mode="min",
            cleanup_tmp_directories=True,
            # Called when a checkpoint is whole, and before older ones are removed.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._name_best),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._best = math.inf, 0  # the loss, and the step
        self._find_best()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error that ends the run is told rather than one that follows from it.
        with contextlib.suppress(NeoError) if kind else contextlib.nullcontext():
            with self._explained():
                self._manager.wait_until_finished()
            self._manager.close()

    def is_best(self, loss: float) -> bool:
        """Tells whether a held-out loss is below that of every checkpoint; NaN never is."""
        return loss < self._best[0]

    def save(self, state: TrainState, config: TrainConfig, loss: float = math.nan) -> None:
        """Starts to write a checkpoint in the background; a step that is there is left alone.

        Args:
          state: to be saved; may be consumed as soon as this returns.
          config: of the run.
          loss: on held-out text, nats a token; NaN where it was not asked for.

        Raises:
          NeoError: this checkpoint, or the one before, cannot be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        with self._explained():
            self._manager.wait_until_finished()
            if self.is_best(loss):
                self._best = loss, step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(dataclasses.asdict(config)),
                    versions=ocp.args.JsonSave(_versions()),
                ),
                metrics=None if math.isnan(loss) else {"loss": loss},
            )

    def restore_latest(self, abstract: TrainState, config: TrainConfig) -> TrainState | None:
        """Returns the newest checkpoint that can be read; None if there is none at all.

        Newer ones that cannot are reported and removed: their steps will be done again.

        Args:
          abstract: a ShapeDtypeStruct with a sharding in the place of each array: where the state
            is to live, whatever the devices and the processes that saved it.
          config: what to train.

        Raises:
          NeoError: the run in this folder trains another model, or no checkpoint can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reasons: list[str] = []
        for i, step in enumerate(steps):
            state, why = self._restore(step, abstract, config)
            if state is None:
                reasons.append(why)
                continue
            for damaged, words in zip(steps, reasons, strict=False):
                _warn(f"checkpoint {damaged} in {self._folder} is damaged ({words}); removed it")
                self._manager.delete(damaged)
            if reasons:
                _warn(f"going on from checkpoint {steps[i]}")
                self._find_best()
            return state
        if not steps:
            return None
        raise NeoError(
            f"no checkpoint in {self._folder} can be read (the newest, {steps[0]}: {reasons[0]}); "
            "bring back the folder or the config it was written by, or choose another output."
        )

    def _restore(
        self, step: int, abstract: TrainState, config: TrainConfig
    ) -> tuple[TrainState | None, str]:
        """Reads a checkpoint; where any process cannot, returns None and the reason."""
        # Not by the manager: a process that fails would leave the others at its barrier.
        handler = ocp.CompositeCheckpointHandler()
        folder = self._folder / str(step)
        state, saved, why = None, None, "another process cannot read it"
        try:
            saved = handler.restore(folder, ocp.args.Composite(config=ocp.args.JsonRestore()))
            saved = saved.config["model"]
        except Exception as error:  # damage shows in many ways
            why = _short(error)
        ours = json.loads(json.dumps(dataclasses.asdict(config.model)))
        if not all_processes(saved in (None, ours)):
            raise NeoError(
                "the run in this output folder trains another model; choose another output, or "
                "delete the folder."
            )
        try:
            if saved is not None:
                restore = ocp.args.StandardRestore(abstract)
                state = handler.restore(folder, ocp.args.Composite(state=restore)).state
        except Exception as error:
            why = _short(error)
        return (state, "") if all_processes(state is not None) else (None, why)

    def _find_best(self) -> None:
        step = self._manager.best_step()
        self._best = (_loss(self._manager.metrics(step)), step) if step else (math.inf, 0)
        self._name_best()

    def _name_best(self) -> None:
        loss, step = self._best
        if not is_leader() or not step:
            return
        path = self._folder.parent / "best.json"
        fields = {"step": step, "eval_loss": loss, "checkpoint": f"checkpoints/{step}"}
        path.write_text(json.dumps(fields) + "\n", encoding="utf-8")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the system
            raise NeoError(
                f"cannot write a checkpoint in {self._folder} ({_short(error)}); make room there "
                "or ask for write access, then give the same command: it goes on from the last "
                "whole checkpoint."
            ) from error


def _loss(metrics: Any) -> float:
    return metrics["loss"]


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"neo_jax": __version__, "python": platform.python_version(), **libraries}


def _short(error: Exception) -> str:
    """Returns why in a few words: tensorstore adds the whole specification of an array."""
    return reason(error).split(" [")[0].rstrip(".")[:200]


def _warn(line: str) -> None:
    if is_leader():
        print(f"neo-jax: {line}.", file=sys.stderr, flush=True)


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
