"""files/locks.py: one writer an output, and none that a dead process keeps."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neo_jax.checkpoints.save import new_folder
from neo_jax.cli.options import output_lines
from neo_jax.cli.sample_file import kept_samples
from neo_jax.data.atomic_folder import staging
from neo_jax.devices import processes
from neo_jax.errors import NeoError
from neo_jax.files import locks
from neo_jax.files.locks import locked
from neo_jax.files.paths import make_path


def hold_file(path):
    return locked(Path(path))


def hold_folder(path):
    return locked(Path(path), inside=True)


WRITERS = {
    "a file": hold_file,
    "a folder": hold_folder,
    "generate": lambda path: kept_samples(path, "run", 0),
    "score": output_lines,
    "prepare": lambda path: staging(Path(path)),
    "quantize, convert": new_folder,
    "train": lambda path: processes.holding(Path(path), inside=True),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_one_writer_at_a_time(writer, tmp_path):
    path = str(tmp_path / "out")
    with writer(path):
        with (
            pytest.raises(NeoError, match=rf"^another process is writing {path}; wait for it"),
            writer(path),
        ):
            pass
        with writer(str(tmp_path / "other")):  # and that one goes on
            pass
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".lock")]


def test_two_names_of_one_output_are_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "real")
    for first, second in (("real", "name"), ("real/file", "name/file")):
        for hold in (hold_file, hold_folder):
            with hold(tmp_path / first), pytest.raises(NeoError), hold(tmp_path / second):
                pass


def test_outputs_in_the_cloud_have_one_writer_on_this_machine(bucket):
    for inside in (False, True):
        with (
            locked(make_path(f"gs://{bucket}/run"), inside),
            locked(make_path(f"gs://{bucket}/other"), inside),
            pytest.raises(NeoError, match=rf"writing gs://{bucket}/run; wait"),
        ):
            locked(make_path(f"gs://{bucket}/run"), inside).__enter__()


HELD = """
import sys
from pathlib import Path
from neo_jax.files.locks import locked
with locked(Path(sys.argv[1]), inside=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path):
    root = str(Path(locks.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", HELD, str(tmp_path / "run")],
        env=os.environ | {"PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(NeoError, match="another process is writing"), hold_folder(tmp_path / "run"):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "run" / ".lock").exists()  # and is no lock any more
    with hold_folder(tmp_path / "run"):
        pass
    assert not os.listdir(tmp_path / "run")


def test_who_waits_with_an_open_file_that_is_removed_takes_the_new_one(tmp_path, monkeypatch):
    """Else it would hold a file without a name, and another process one with this name."""
    flock = locks.fcntl.flock

    def slow(file, how):
        monkeypatch.undo()
        (tmp_path / ".out.lock").unlink()  # whoever held it is done
        flock(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", slow)
    with hold_file(tmp_path / "out"), pytest.raises(NeoError), hold_file(tmp_path / "out"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with hold_file(tmp_path / "out"), hold_file(tmp_path / "out"):
        pass


def test_a_folder_made_for_nothing_goes(tmp_path):
    for name, write in (("nothing", False), ("something", True)):
        with hold_folder(tmp_path / name):
            if write:
                (tmp_path / name / "file").touch()
    assert os.listdir(tmp_path) == ["something"]


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for hold, path in ((hold_folder, "file"), (hold_folder, "file/a"), (hold_file, "file/a")):
        with pytest.raises(NeoError, match=r"^cannot write .*file"), hold(tmp_path / path):
            pass


def test_the_first_of_several_processes_alone_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_leader", lambda: False)
    with processes.holding(tmp_path / "out"):
        assert not os.listdir(tmp_path)
    # Where it cannot, none goes on.
    monkeypatch.setattr(processes, "all_processes", lambda here: False)
    with (
        pytest.raises(NeoError, match=r"process 0 cannot write .*out; it says why"),
        processes.holding(tmp_path / "out"),
    ):
        pass


def test_a_new_folder_holds_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    for name in ("taken", "taken/file"):
        with (
            pytest.raises(NeoError, match=rf"{name} is there already; choose a new folder, or"),
            new_folder(tmp_path / name),
        ):
            pass
    # What a killed process has left is nothing.
    (tmp_path / "killed" / ".saving-1" / "more").mkdir(parents=True)
    (tmp_path / "killed" / ".lock").touch()
    with new_folder(tmp_path / "killed") as folder:
        assert os.listdir(folder) == [".lock"]
