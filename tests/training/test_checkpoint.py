"""training/checkpoint.py: what stays, what is damaged, what cannot be written."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_files import write_config

from neo_jax.errors import NeoError
from neo_jax.files.paths import find_files
from neo_jax.training import checkpoint, snapshot
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.step import TrainState

NAN = float("nan")


def state(step):
    """A state that differs from that of any other step."""
    noise = np.random.default_rng(step).normal(size=(64, 48)).astype(np.float32)
    return TrainState(
        jnp.int32(step),
        {"h": {"kernel": jnp.asarray(noise)}},
        {"count": jnp.int32(step)},
        jnp.zeros(2, jnp.int32),
    )


def abstract():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state(0)
    )


def assert_is_step(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))


@pytest.fixture
def save(config):
    """Saves steps with a held-out loss each, in one go; returns what is there then."""

    def call(losses, folder="run/checkpoints", **options):
        folder = Path(config.output).parent / folder
        with Checkpoints(folder, **options) as checkpoints:
            for step, loss in losses.items():
                checkpoints.save(state(step), config, loss)
        return {path.name for path in folder.iterdir()}

    return call


def restore(config, folder):
    with Checkpoints(folder, keep=3) as checkpoints:
        return checkpoints.restore_latest(abstract(), config)


# What stays.


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [
        ([5, 3, 4, 4, 4, 4], {"2", "5", "6"}, 2),
        ([5, 3, 4, 4, 4, 1], {"5", "6"}, 6),
        ([NAN, 3, 4, NAN, 4, 3], {"2", "5", "6"}, 2),
        ([NAN] * 6, {"5", "6"}, None),
    ],
)
def test_the_newest_stay_and_the_best(config, save, losses, kept, best):
    losses = dict(enumerate(losses, 1))
    save({step: losses.pop(step) for step in (1, 2, 3)})
    with Checkpoints(Path(config.output) / "checkpoints") as checkpoints:
        checkpoints.restore_latest(abstract(), config)  # learns the best of those before
        for step, loss in losses.items():
            assert checkpoints.is_best(loss) == (step == best)
            checkpoints.save(state(step), config, loss)
    assert save({}) == kept
    file = Path(config.output) / "best.json"
    assert file.exists() == (best is not None)
    if best:
        expected = {
            "step": best,
            "eval_loss": losses.get(best, 3),
            "checkpoint": f"checkpoints/{best}",
        }
        assert json.loads(file.read_text()) == expected


def test_some_stay_for_good(save):
    assert save(dict.fromkeys(range(1, 7), NAN), keep=1, keep_every=2) == {"2", "4", "6"}


def test_a_checkpoint_says_what_wrote_it(config, save):
    save({7: 1.0})
    folder = Path(config.output) / "checkpoints" / "7"
    fields = json.loads((folder / "config" / "metadata").read_text())
    assert fields["seed"] == config.seed
    assert fields["model"]["embed_dim"] == 32
    versions = json.loads((folder / "versions" / "metadata").read_text())
    assert versions["jax"] == jax.__version__
    assert set(versions) == {"neo_jax", "python", "jax", "flax", "optax", "orbax-checkpoint"}


# What a kill, a disk or a hand has damaged.


@pytest.fixture(scope="module")
def three(six_steps, tmp_path_factory):
    """The output of a run with checkpoints of the steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("three")
    with Checkpoints(output / "checkpoints", keep=3) as checkpoints:
        for step in (2, 4, 6):
            checkpoints.save(state(step), six_steps, 1.0)
    return output


@pytest.fixture
def folder(config, three):
    """A copy of its checkpoints."""
    shutil.copytree(three, config.output)
    return Path(config.output) / "checkpoints"


def remove(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scramble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def flip(path):
    """One bit: what is read then has the right shape and the right form."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in find_files(folder)}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config/metadata", remove),
        ("config/metadata", flip),  # not "another model"
        ("checks/metadata", truncate),
        ("state/_METADATA", scramble),
        ("largest", truncate),
        ("largest", scramble),
        ("largest", flip),
    ],
)
def test_the_one_before_a_damaged_checkpoint_is_used(config, save, folder, capfd, file, damage):
    files = [path for path in (folder / "6").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    damage(largest if file == "largest" else folder / "6" / file)
    left = contents(folder / "6")
    assert_is_step(restore(config, folder), 4)
    out, err = capfd.readouterr()
    assert err.startswith(f"neo-jax: checkpoint 6 in {folder} cannot be read (")
    assert err.endswith("); it is now called 6.unreadable, going on from 4.\n")
    assert (out, err.count("\n")) == ("", 1)
    # Its steps are done again; nothing removes what was set aside, or counts it.
    assert save({5: 1.0, 6: 1.0}, keep=1) == {"5", "6", "6.unreadable"}
    assert contents(folder / "6.unreadable") == left
    assert_is_step(restore(config, folder), 6)
    assert capfd.readouterr() == ("", "")


def test_two_damaged_checkpoints(config, folder, capfd):
    for step in ("4", "6"):
        shutil.rmtree(folder / step / "state")
    (folder / "6.unreadable").mkdir()  # of another day
    assert_is_step(restore(config, folder), 2)
    err = capfd.readouterr().err
    assert all(f"checkpoint {i} in {folder} cannot be read" in err for i in (4, 6))
    assert err.count("going on from 2.") == 2
    assert {path.name for path in folder.iterdir()} == {
        "2", "4.unreadable", "6.unreadable", "6.unreadable-2",
    }  # fmt: skip


def failing(monkeypatch, names, times):
    """Makes the first reads of checkpoints or items of these names time out."""
    read, left = snapshot._read, iter(range(times))

    def fail(folder, name, how):
        if names & {folder.name, name} and next(left, None) is not None:
            raise OSError(110, "Connection timed out")
        return read(folder, name, how)

    monkeypatch.setattr(snapshot, "_read", fail)


@pytest.mark.parametrize("name", ["6", "state", "evaluation"])
def test_what_cannot_be_read_for_a_while_is_read(config, folder, capfd, monkeypatch, name):
    failing(monkeypatch, {name}, times=1)
    assert_is_step(restore(config, folder), 6)
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in folder.iterdir()} == {"2", "4", "6"}


def test_what_cannot_be_read_for_long_can_be_brought_back(config, folder, capfd, monkeypatch):
    left = contents(folder / "6")
    with monkeypatch.context() as patch:
        failing(patch, {"6"}, times=2)
        assert_is_step(restore(config, folder), 4)
    assert "(Connection timed out); it is now called 6.unreadable" in capfd.readouterr().err
    assert contents(folder / "6.unreadable") == left
    (folder / "6.unreadable").rename(folder / "6")
    assert_is_step(restore(config, folder), 6)


@pytest.mark.parametrize("what", ["config", "state"])
def test_what_another_process_cannot_read_is_not_lost(config, folder, capfd, monkeypatch, what):
    """Which step to go on from is for all to agree; a fault of one removes nothing for all."""
    answers = iter([True, False] if what == "config" else [True, True, False])
    monkeypatch.setattr(checkpoint, "all_processes", lambda here: here and next(answers, True))
    assert_is_step(restore(config, folder), 4)
    assert "(another process cannot read it); it is now called 6." in capfd.readouterr().err
    assert {path.name for path in folder.iterdir()} == {"2", "4", "6.unreadable"}


def test_what_cannot_be_renamed_ends_the_run(config, folder, monkeypatch):
    def fail(folder, to):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "move_folder", fail)
    shutil.rmtree(folder / "6" / "state")
    with pytest.raises(NeoError, match=r"cannot rename all of the checkpoints 6 in .* \("):
        restore(config, folder)
    assert {path.name for path in folder.iterdir()} == {"2", "4", "6"}


def test_where_all_are_damaged_none_is_touched(config, folder):
    for path in folder.glob("*/config/metadata"):
        remove(path)
    with pytest.raises(
        NeoError, match=r"no checkpoint in .* can be read \(the newest, 6: .*\); br"
    ):
        restore(config, folder)
    assert {path.name for path in folder.iterdir()} == {"2", "4", "6"}


def test_a_checkpoint_of_an_older_version_has_no_checksums(config, folder, capfd):
    shutil.rmtree(folder / "6" / "checks")
    assert_is_step(restore(config, folder), 6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("named", [True, False])
def test_the_best_is_not_lost_where_its_loss_cannot_be_read(config, save, capfd, named):
    """Nor does another one become the best, as long as best.json says which it was."""
    folder, file = Path(config.output) / "checkpoints", Path(config.output) / "best.json"
    save({2: 1.0, 4: 3.0, 6: 2.0}, keep=3)
    flip(folder / "2" / "evaluation" / "metadata")
    if not named:
        file.unlink()
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.restore_latest(abstract(), config)
        assert checkpoints.best == ((1.0, 2) if named else (2.0, 6))
        for step in (8, 10):
            checkpoints.save(state(step), config, 4.0)
    end = "best.json has it" if named else "it stays"
    err = capfd.readouterr().err
    assert err.startswith(f"neo-jax: the held-out loss of {folder}/2 cannot be read (")
    assert err.endswith(f"); {end}.\n")
    assert {path.name for path in folder.iterdir()} == ({"2", "10"} if named else {"2", "6", "10"})
    assert json.loads(file.read_text())["step"] == (2 if named else 6)


def test_a_half_written_checkpoint_is_none(config, save, folder):
    (folder / "6").rename(folder / "6.orbax-checkpoint-tmp")
    assert_is_step(restore(config, folder), 4)
    assert save({5: NAN}, keep=3) == {"2", "4", "5"}


@pytest.mark.parametrize(("change", "dtype", "fine"), [
    (0.0, "float32", True), (0.0, "bfloat16", True), (1e-6, "float32", False),
    (1e-6, "bfloat16", True), (0.1, "bfloat16", False),
])  # fmt: skip
def test_adapters_go_on_with_their_model_alone(config, change, dtype, fine):
    """In any dtype of products, in which alone a difference can tell; and it is remembered."""
    frozen = {"kernel": jnp.linspace(1, 2, 64)}
    other = {"kernel": (frozen["kernel"].at[7].add(change)).astype(dtype)}
    folder = Path(config.output) / "checkpoints"
    with Checkpoints(folder, base=snapshot.base_of(frozen)) as checkpoints:
        checkpoints.save(state(1), config)
    with Checkpoints(folder, base=snapshot.base_of(other)) as checkpoints:
        if not fine:
            with pytest.raises(NeoError, match="trains adapters of another model than the one in"):
                checkpoints.restore_latest(abstract(), config)
            return
        assert_is_step(checkpoints.restore_latest(abstract(), config), 1)
        checkpoints.save(state(2), config)
    fields = snapshot.read(folder / "2", "config")
    assert fields["base"] == snapshot.base_of(frozen)


# What cannot be written.


def test_a_full_disk_is_told_at_the_start(config, monkeypatch):
    usage = SimpleNamespace(free=1000, total=1_000_000)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NeoError, match=r"takes 1\.23e-05 GB, and .* has 1e-06 GB left; make room"):
        restore(config, Path(config.output) / "checkpoints")


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(config, save, folder, monkeypatch):
    usage = SimpleNamespace(free=1000, total=1_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(NeoError, match="make room there, then give the same command: it goes"):
            save({8: 1.0})
    assert_is_step(restore(config, folder), 6)


FAILING = """
import sys
import orbax.checkpoint as ocp
from neo_jax.cli import main

def fail(self, *args, **options):
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

ocp.JsonCheckpointHandler._save_fn = fail  # deep in the threads that write
sys.exit(main(["train", sys.argv[1]]))
"""


def test_a_save_that_fails_in_the_background_is_one_line_and_the_end(config, tmp_path):
    file = tmp_path / "config.py"
    write_config(file, config)
    root = str(Path(checkpoint.__file__).parents[2])
    quick = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = {**os.environ, **quick, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FAILING, str(file)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    told = [line for line in done.stderr.splitlines() if not line.startswith("step ")]
    assert told == [
        f"neo-jax: cannot write a checkpoint in {config.output}/checkpoints (RESOURCE_EXHAUSTED: "
        "No space left on device); make room there or ask for write access, then give the same "
        "command: it goes on from the last whole checkpoint."
    ]
    assert (done.returncode, done.stdout) == (1, "")


def test_nothing_of_the_process_is_changed(save, caplog):
    """Messages of others are not dropped: no filters, no hooks."""
    loggers = [logging.getLogger(name) for name in ("", "absl", "asyncio")]
    before = sys.unraisablehook, warnings.filters[:], [logger.filters[:] for logger in loggers]
    save({1: 1.0})
    after = sys.unraisablehook, warnings.filters[:], [logger.filters[:] for logger in loggers]
    assert after == before
    logging.getLogger("asyncio").warning("Executing %s took 3 s", "it")
    assert [record.getMessage() for record in caplog.records] == ["Executing it took 3 s"]
