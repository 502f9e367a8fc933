"""neo_jax/training/checkpoint.py: what stays, what is damaged, what cannot be written."""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from neo_jax.errors import NeoError
from neo_jax.training import checkpoint, loop
from neo_jax.training.loop import train
from neo_jax.training.report import Evaluation


def folders(config):
    return {path.name for path in (Path(config.output) / "checkpoints").iterdir()}


def assert_identical(ours, theirs):
    assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


@pytest.fixture(scope="module")
def finished(six_steps, tmp_path_factory):
    """A run with checkpoints at steps 2, 4 and 6: its config and its final state."""
    output = tmp_path_factory.mktemp("finished") / "run"
    config = dataclasses.replace(six_steps, output=str(output), save_every=2, keep=3)
    return config, train(config)


@pytest.fixture
def copy(finished, tmp_path):
    """The config of a copy of that run, and its checkpoints."""
    output = tmp_path / "copy"
    shutil.copytree(finished[0].output, output)
    return dataclasses.replace(finished[0], output=str(output)), output / "checkpoints"


# What stays.


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([5, 3, 4, 4, 4, 4], {"2", "5", "6"}, 2),
        ([5, 3, 4, 4, 4, 1], {"5", "6"}, 6),
        ([float("nan"), 3, 4, float("nan"), 4, 3], {"2", "5", "6"}, 2),
        ([float("nan")] * 6, {"5", "6"}, None),
    ],
)
def test_the_newest_stay_and_the_best(config, monkeypatch, losses, kept, best):
    left = iter(losses)
    monkeypatch.setattr(
        loop, "_make_evaluation", lambda *_: lambda state: Evaluation(next(left), 1.0)
    )
    config = dataclasses.replace(config, eval_every=1, save_every=1)
    train(dataclasses.replace(config, steps=3))
    train(config)  # it knows the best of those before
    assert folders(config) == kept
    file = Path(config.output) / "best.json"
    assert file.exists() == (best is not None)
    if best:
        expected = {
            "step": best,
            "eval_loss": losses[best - 1],
            "checkpoint": f"checkpoints/{best}",
        }
        assert json.loads(file.read_text()) == expected


def test_the_best_is_saved_at_whatever_step(config, monkeypatch):
    left = iter([3.0, 4.0, 2.0, 5.0, 5.0, 5.0])
    monkeypatch.setattr(
        loop, "_make_evaluation", lambda *_: lambda state: Evaluation(next(left), 1.0)
    )
    train(dataclasses.replace(config, eval_every=1, save_every=6, keep=1))
    assert folders(config) == {"3", "6"}


def test_some_stay_for_good(config):
    train(dataclasses.replace(config, save_every=1, keep=1, keep_every=2))
    assert folders(config) == {"2", "4", "6"}


def test_a_checkpoint_says_what_wrote_it(finished):
    folder = Path(finished[0].output) / "checkpoints" / "6"
    fields = json.loads((folder / "config" / "metadata").read_text())
    assert fields["seed"] == finished[0].seed
    assert fields["model"]["embed_dim"] == 32
    versions = json.loads((folder / "versions" / "metadata").read_text())
    assert versions["jax"] == jax.__version__
    assert set(versions) == {"neo_jax", "python", "jax", "flax", "optax", "orbax-checkpoint"}


# What a kill, a disk or a hand has damaged.


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


@pytest.mark.parametrize("damage", [remove, truncate, scramble])
@pytest.mark.parametrize("file", ["config/metadata", "state/_METADATA", "largest"])
def test_the_one_before_a_damaged_checkpoint_is_used(copy, finished, capfd, file, damage):
    config, checkpoints = copy
    files = [path for path in (checkpoints / "6").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    damage(largest if file == "largest" else checkpoints / "6" / file)
    assert_identical(train(config), finished[1])
    err = capfd.readouterr().err.splitlines()
    told = [line for line in err if not line.startswith("step ")]
    assert len(told) == 1
    assert told[0].startswith(f"neo-jax: checkpoint 6 in {checkpoints} is damaged (")
    assert told[0].endswith("); removed it, going on from 4.")
    assert folders(config) == {"2", "4", "6"}
    train(config)  # all is well again
    assert capfd.readouterr().err == ""


def test_two_damaged_checkpoints(copy, finished, capfd):
    config, checkpoints = copy
    for step in ("4", "6"):
        shutil.rmtree(checkpoints / step / "state")
    assert_identical(train(config), finished[1])
    err = capfd.readouterr().err
    assert all(f"checkpoint {i} in {checkpoints} is damaged" in err for i in (4, 6))
    assert err.count("going on from 2.") == 2


def test_where_all_are_damaged_none_is_removed(copy):
    config, checkpoints = copy
    for step in folders(config):
        remove(checkpoints / step / "config" / "metadata")
    with pytest.raises(
        NeoError, match=r"no checkpoint in .* can be read \(the newest, 6: .*\); br"
    ):
        train(config)
    assert folders(config) == {"2", "4", "6"}


def test_a_damaged_evaluation_only_loses_the_best(copy, finished, capfd):
    config, checkpoints = copy
    scramble(checkpoints / "6" / "evaluation" / "metadata")
    assert_identical(train(config), finished[1])
    assert capfd.readouterr().err == ""


def test_a_half_written_checkpoint_is_none(copy, finished):
    config, checkpoints = copy
    (checkpoints / "6").rename(checkpoints / "6.orbax-checkpoint-tmp")
    assert_identical(train(config), finished[1])
    assert folders(config) == {"2", "4", "6"}


# What cannot be written.


def test_a_full_disk_is_told_at_the_start(config, monkeypatch):
    usage = SimpleNamespace(free=1000, total=1_000_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NeoError, match=r"takes 0\.\d+ GB, and .* has 1e-06 GB left; make room"):
        train(config)
    assert not (Path(config.output) / "metrics.jsonl").exists()


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(config, monkeypatch):
    usage = SimpleNamespace(free=10**9, total=10**10)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)

    def filling(*args, **options):
        for i, batch in enumerate(batches(*args, **options)):
            usage.free = 10**9 if i < 5 else 1000
            yield batch

    batches = loop.batches
    with monkeypatch.context() as patch:
        patch.setattr(loop, "batches", filling)
        with pytest.raises(NeoError, match="make room there, then give the same command: it goes"):
            train(config)
    assert folders(config) == {"3"}
    usage.free = 10**9
    assert int(train(config).step) == 6


def test_a_save_that_fails_in_the_background_is_told_in_one_line(config, monkeypatch):
    save = checkpoint.ocp.CheckpointManager.save

    def failing(self, step, **options):
        if step == 6:
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")
        return save(self, step, **options)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", failing)
    with pytest.raises(NeoError) as error:
        train(config)
    folder = Path(config.output) / "checkpoints"
    assert str(error.value) == (
        f"cannot write a checkpoint in {folder} (RESOURCE_EXHAUSTED: No space left on device); make "
        "room there or ask for write access, then give the same command: it goes on from the last "
        "whole checkpoint."
    )
    assert folders(config) == {"3"}


def test_other_messages_are_not_dropped(caplog):
    logging.getLogger("asyncio").warning("Executing %s took 3 s", "it")
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    assert [record.getMessage() for record in caplog.records] == ["Executing it took 3 s"]
