"""Checkpoints of training: orbax, asynchronous; the newest few are kept, and the best.

A checkpoint is a folder named for its step: `state` (its arrays; the step is one of them), and as
JSON `config` (the seed, from which every random key comes, included), `versions` of the libraries,
and `evaluation`, the held-out loss where there is one. It has that name as soon as it is whole.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from neo_jax import __version__
from neo_jax.config import ModelConfig
from neo_jax.distributed import all_processes, check_shared, is_leader
from neo_jax.errors import NeoError, reason
from neo_jax.paths import absolute, check_writable, is_remote, make_path
from neo_jax.training.config import TrainConfig
from neo_jax.training.state import TrainState

# What fields of a model were before they were there.
_MODEL = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


class SaveError(NeoError):
    """A checkpoint that cannot be written. Threads of orbax may wait ten minutes for the rest."""


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
        check_shared(self._folder)
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_news)
        kept: list[Any] = [policies.LatestN(keep), _Best(self)]
        if keep_every:
            kept.append(policies.EveryNSteps(keep_every))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            lightweight_initialize=True,  # reads nothing that may be damaged
            cleanup_tmp_directories=True,
            # Called when a checkpoint is whole, and before older ones are removed.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._name_best),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self.best = math.inf, 0  # the least held-out loss of a checkpoint, and its step

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
        return loss < self.best[0]

    def save(self, state: TrainState, config: TrainConfig, loss: float = math.nan) -> None:
        """Starts to write a checkpoint in the background; a step that is there is left alone.

        Args:
          state: to be saved; may be consumed as soon as this returns.
          config: of the run.
          loss: on held-out text, nats a token; NaN where it was not asked for.

        Raises:
          NeoError: the disk has no room for it; a `SaveError` where it, or the one before, cannot
            be written.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        self._check_room(state)
        with self._explained():
            self._manager.wait_until_finished()
            if self.is_best(loss):
                self.best = loss, step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    config=ocp.args.JsonSave(dataclasses.asdict(config)),
                    versions=ocp.args.JsonSave(_versions()),
                    evaluation=ocp.args.JsonSave({} if math.isnan(loss) else {"loss": loss}),
                ),
            )

    def restore_latest(self, abstract: TrainState, config: TrainConfig) -> TrainState | None:
        """Returns the newest checkpoint that can be read; None if there is none at all.

        Newer ones that cannot are reported and removed: their steps will be done again.

        Args:
          abstract: a ShapeDtypeStruct with a sharding in the place of each array: where the state
            is to live, whatever the devices and the processes that saved it.
          config: what to train.

        Raises:
          NeoError: the run in this folder trains another model, no checkpoint can be read, or the
            disk has no room for one more.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if config.steps not in steps:
            self._check_room(abstract)
        reasons: list[str] = []
        for step in steps:
            state, why = self._restore(step, abstract, config)
            if state is None:
                reasons.append(why)
                continue
            for damaged, words in zip(steps, reasons, strict=False):
                _warn(
                    f"checkpoint {damaged} in {self._folder} is damaged ({words}); removed it, "
                    f"going on from {step}"
                )
                self._manager.delete(damaged)
            self.best = self._find_best()
            self._name_best()
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
        state, saved, why = None, None, "another process cannot read it"
        ours = json.loads(json.dumps(dataclasses.asdict(config)))
        with _quiet():
            try:
                read = self._read(step, config=ocp.args.JsonRestore()).config
                saved = {"lora": ours["lora"], **read, "model": _MODEL | read["model"]}
            except Exception as error:  # damage shows in many ways
                why = _short(error)
        for name, what in (("model", "another model"), ("lora", "other adapters")):
            if not all_processes(saved is None or saved[name] == ours[name]):
                raise NeoError(
                    f"the run in this output folder trains {what}; choose another output, or "
                    "delete the folder."
                )
        with _quiet():
            try:
                if saved is not None:
                    state = self._read(step, state=ocp.args.StandardRestore(abstract)).state
            except Exception as error:
                why = _short(error)
        return (state, "") if all_processes(state is not None) else (None, why)

    def _read(self, step: int, **items: Any) -> Any:
        # Not by the manager: a process that fails would leave the others at its barrier.
        handler = ocp.CompositeCheckpointHandler()
        return handler.restore(self._folder / str(step), ocp.args.Composite(**items))

    def _find_best(self) -> tuple[float, int]:
        """Returns what `best` is to be, infinity where there was no evaluation."""
        best = math.inf, 0
        for step in self._manager.all_steps():
            with _quiet(), contextlib.suppress(Exception):  # a damaged one is not the best
                read = self._read(step, evaluation=ocp.args.JsonRestore())
                best = min(best, (read.evaluation.get("loss", math.inf), step))
        return best

    def _name_best(self) -> None:
        loss, step = self.best
        if is_leader() and step:
            fields = {"step": step, "eval_loss": loss, "checkpoint": f"checkpoints/{step}"}
            path = self._folder.parent / "best.json"
            path.write_text(json.dumps(fields) + "\n", encoding="utf-8")

    def _check_room(self, state: TrainState) -> None:
        """Tells of a full disk before orbax does, whose threads have a lot to say."""
        if is_remote(self._folder):
            return
        needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        disk = shutil.disk_usage(self._folder)
        if disk.free < needed and disk.total:  # some network disks do not know
            raise NeoError(
                f"a checkpoint takes {needed / 1e9:.3g} GB, and {self._folder} has "
                f"{disk.free / 1e9:.3g} GB left; make room there, then give the same command: it "
                "goes on from the last checkpoint."
            )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the system
            raise SaveError(
                f"cannot write a checkpoint in {self._folder} ({_short(error)}); make room there "
                "or ask for write access, then give the same command: it goes on from the last "
                "whole checkpoint."
            ) from error


@dataclasses.dataclass
class _Best(policies.PreservationPolicy):
    """Keeps the best checkpoint."""

    of: Checkpoints

    def should_preserve(
        self,
        checkpoints: Sequence[policies.PolicyCheckpointInfo],
        *,
        context: policies.PreservationContext,
    ) -> Sequence[bool]:
        """Tells of each checkpoint whether to keep it."""
        return [info.step == self.of.best[1] for info in checkpoints]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Python prints of reads that are given up because one of them failed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            gc.collect()  # it is now that it would print
            sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    """Tells a message from what orbax and its tasks log, at length, beside raising it."""
    return "orbax" not in record.pathname and not str(record.msg).startswith("Task exception")


def _versions() -> dict[str, str]:
    libraries = {name: version(name) for name in _LIBRARIES}
    return {"neo_jax": __version__, "python": platform.python_version(), **libraries}


def _short(error: BaseException) -> str:
    """Returns why in a few words: orbax and tensorstore add the specification of an array."""
    while error.__cause__:
        error = error.__cause__
    words = reason(error).split(" [")[0].rstrip(".")
    while len(words) > 150 and ": " in words:  # the innermost is the last
        words = words.split(": ", 1)[1]
    return words[:150]


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
