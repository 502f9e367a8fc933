"""Checkpoints of training: orbax, asynchronous; the newest few are kept, and the best.

A checkpoint is a folder named for its step, which `snapshot` describes. It has that name as soon as
it is whole. What cannot be read is set aside, and never removed.
"""

import contextlib
import functools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from neo_jax.devices.processes import all_processes, check_shared, from_leader, is_leader, say
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import (
    absolute,
    check_writable,
    is_remote,
    make_path,
    move_folder,
    write_whole,
)
from neo_jax.training import snapshot
from neo_jax.training.config import TrainConfig
from neo_jax.training.step import TrainState


class SaveError(NeoError):
    """A checkpoint that cannot be written. Threads of orbax may wait ten minutes for the rest."""


class Checkpoints:
    """The checkpoints of one run, in `folder`. A context manager: leaving it waits for writes.

    The best one is named in best.json next to the folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 2,
        keep_every: int = 0,
        base: snapshot.Base | None = None,
        metric: str = "",
    ):
        """Opens the folder, creating it if need be, and removes what a kill left half written.

        It is for the checkpoints of this run and nothing else. So many of the newest stay, and
        those of multiples of `keep_every` where that is not 0. Of the base see `snapshot.base_of`.
        The best is the one of the least loss or, where there is a metric, of the most of it; then
        what stands for losses is its opposite.

        Raises:
          NeoError: the folder cannot be written or listed, or its bucket is refused.
        """
        self._folder = absolute(make_path(folder))
        check_writable(self._folder)
        _check_bucket(self._folder)
        check_shared(self._folder)
        self._base, self._metric = base or {}, metric
        self.best = math.inf, 0  # the least held-out loss of a checkpoint, and its step
        self._unknown: list[int] = []  # steps whose held-out loss cannot be read
        self.changes: dict[str, str] = {}
        # The first of them is of the best.
        self._kept = [policies.CustomSteps([]), policies.LatestN(keep)]
        if keep_every:
            self._kept.append(policies.EveryNSteps(keep_every))
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(self._kept),
            lightweight_initialize=True,  # reads nothing that may be damaged
            cleanup_tmp_directories=True,
            # Called when a checkpoint is whole, and before older ones are removed.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._name_best),
        )
        try:
            return ocp.CheckpointManager(self._folder, options=options)
        except Exception as error:  # of several libraries, which share no base
            raise NeoError(
                f"cannot list the checkpoints in {self._folder} ({snapshot.short(error)}); give "
                "the same command again."
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error that ends the run is reported rather than one that follows from it.
        with contextlib.suppress(NeoError) if kind else contextlib.nullcontext():
            with self._explained():
                self._manager.wait_until_finished()
            self._manager.close()

    def is_best(self, loss: float) -> bool:
        """Returns whether a held-out loss is below that of every checkpoint; NaN never is."""
        return loss < self.best[0]

    def save(self, state: TrainState, config: TrainConfig, loss: float = math.nan) -> None:
        """Starts to write a checkpoint in the background; a step that is there is left alone.

        The state may be consumed as soon as this returns. The loss is that on held-out text, NaN
        where there was no evaluation.

        Raises:
          NeoError: the disk has no room for it; a `SaveError` where it, or the one before, cannot
            be written.
        """
        step = int(state.step)
        if step in self._steps():
            return
        self._check_room(state)
        with self._explained():
            self._manager.wait_until_finished()
            if self.is_best(loss):
                self._keep_best(loss, step)
            self._manager.save(step, args=snapshot.items(state, config, loss, self._base))

    def restore_latest(self, abstract: TrainState, config: TrainConfig) -> TrainState | None:
        """Returns the newest checkpoint that can be read; None if there is none at all.

        Newer ones that some process cannot read, after several attempts, are reported and renamed,
        STEP.unreadable: their steps will be done again. Nothing removes them. (On gs://, where no
        folder has a name of its own, their objects are copied to the new name, then removed.)

        `changes` then holds the fields of the config that have changed, by name. `abstract` says
        where each array is to live, whatever the devices and the processes that saved it.

        Raises:
          NeoError: the run in this folder trains something else, no checkpoint can be read, or the
            disk has no room for one more.
        """
        steps = self._steps()[::-1]
        if config.steps > max(steps, default=0):
            self._check_room(abstract)
        unread: dict[int, str] = {}
        for step in steps:
            state, why = self._restore(self._folder / str(step), abstract, config)
            if state is not None:
                self._set_aside(unread, step)
                self._find_best()
                return state
            unread[step] = why
        if not steps:
            return None
        raise NeoError(
            f"no checkpoint in {self._folder} can be read (the newest, {steps[0]}: "
            f"{unread[steps[0]]}); bring back the folder or the config it was written by, or "
            "choose another output."
        )

    def restore_best(self, abstract: TrainState, config: TrainConfig) -> TrainState | None:
        """Returns the best checkpoint; None if there is none, or it cannot be read."""
        with self._explained():
            self._manager.wait_until_finished()
        folder = self._folder / str(self.best[1])
        return self._restore(folder, abstract, config)[0] if self.best[1] else None

    def _restore(
        self, folder: Path, abstract: TrainState, config: TrainConfig
    ) -> tuple[TrainState | None, str]:
        """Reads a checkpoint; where any process cannot, returns None and the reason."""
        read = None
        saved, why = snapshot.attempt(functools.partial(snapshot.read, folder, "config"))
        other = snapshot.other(saved, config, self._base) if saved else ""
        if not all_processes(not other):
            raise NeoError(
                f"the run in this output folder trains {other or 'something else'}; choose another "
                "output, or delete the folder."
            )
        if saved:
            self.changes = snapshot.changes(saved, config)
            self._base = saved.get("base", {}) | self._base  # also of the dtypes of earlier runs
            load = functools.partial(snapshot.read_state, folder, abstract)
            read, why = snapshot.attempt(load)
        if all_processes(read is not None):
            assert read is not None
            why = snapshot.difference(*read)
            if all_processes(not why):
                return read[0], ""
        return None, why or "another process cannot read it"

    def _set_aside(self, unread: dict[int, str], step: int) -> None:
        """Renames checkpoints that cannot be read, before going on from an older one."""
        if not unread:
            return
        error = None
        for newer, why in unread.items() if is_leader() else ():
            names = (f"{newer}.unreadable{end}" for end in ("", *map("-{}".format, range(2, 99))))
            name = next(name for name in names if not (self._folder / name).exists())
            try:
                move_folder(self._folder / str(newer), self._folder / name)
            except Exception as caught:  # of several libraries, which share no base
                error = caught
                break
            say(
                f"neo-jax: checkpoint {newer} in {self._folder} cannot be read ({why}); it is now "
                f"called {name}, going on from {step}."
            )
        if not all_processes(error is None):
            why = reason(error) if error else "process 0 says why"
            raise NeoError(
                f"cannot rename all of the checkpoints {', '.join(map(str, unread))} in "
                f"{self._folder}, which cannot be read ({why}); move them out of the way."
            ) from error
        self._manager.close()
        self._manager = self._open()

    def _steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the oldest first, as process 0 sees them."""
        steps = np.asarray(self._manager.all_steps(), np.int32)
        count = int(from_leader(np.asarray(len(steps), np.int32)))
        return from_leader(np.resize(steps, count)).tolist()

    def _find_best(self) -> None:
        """Finds the best checkpoint, and those that may be it, for process 0 to say.

        An evaluation that cannot be read is what best.json says of that step, or may be any.
        """
        steps = self._steps()
        losses = np.full(len(steps), math.nan)
        for i, step in enumerate(steps) if is_leader() else ():
            folder = self._folder / str(step)
            found, why = snapshot.attempt(functools.partial(snapshot.read, folder, "evaluation"))
            if found is None:
                losses[i] = self._named_loss(step)
                what = "it stays" if math.isnan(losses[i]) else "best.json has it"
                say(f"neo-jax: the held-out loss of {folder} cannot be read ({why}); {what}.")
            else:
                losses[i] = found.get("loss", math.inf)
        losses = from_leader(losses.view(np.uint32)).view(np.float64)  # bit by bit
        pairs = list(zip(losses.tolist(), steps, strict=True))
        self._unknown = [step for loss, step in pairs if loss != loss]
        self._keep_best(*min((p for p in pairs if p[0] < math.inf), default=(math.inf, 0)))
        self._name_best()

    def _keep_best(self, loss: float, step: int) -> None:
        self.best = loss, step
        self._kept[0] = policies.CustomSteps([step, *self._unknown])

    def _named_loss(self, step: int) -> float:
        """Returns the held-out loss of a step if best.json names it, else NaN."""
        with contextlib.suppress(Exception):
            fields = json.loads((self._folder.parent / "best.json").read_text(encoding="utf-8"))
            if fields["step"] == step:
                return float(fields["eval_loss"]) if not self._metric else -fields[self._metric]
        return math.nan

    def _name_best(self) -> None:
        loss, step = self.best
        if is_leader() and step:
            value = {self._metric: -loss} if self._metric else {"eval_loss": loss}
            fields = {"step": step, **value, "checkpoint": f"checkpoints/{step}"}
            write_whole(self._folder.parent / "best.json", json.dumps(fields) + "\n")

    def _check_room(self, state: TrainState) -> None:
        """Reports a full disk before orbax does, whose threads log at length."""
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
        # What a quota leaves is known by writing alone.
        with self._explained(), tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(bytes(min(needed, 2**20)))

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of orbax, tensorstore or the system
            raise SaveError(
                f"cannot write a checkpoint in {self._folder} ({snapshot.short(error)}); make room "
                "there or ask for write access, then give the same command: it goes on from the "
                "last whole checkpoint."
            ) from error


def _check_bucket(folder: Path) -> None:
    """Requests the bucket as orbax will, the first time it removes a checkpoint: hours from now."""
    if not is_remote(folder):
        return
    from google.cloud import storage

    try:
        storage.Client().get_bucket(str(folder).split("/")[2])
    except Exception as error:  # of several libraries, which share no base
        raise NeoError(
            f"cannot keep checkpoints in {folder} ({reason(error)}); ask for storage.buckets.get, "
            "as in the role Storage Legacy Bucket Reader, in addition to the right to write "
            "objects."
        ) from error
