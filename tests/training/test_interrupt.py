"""training/interrupt.py: runs that are asked to stop, and runs that are killed."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from neo_jax.devices import signals
from neo_jax.devices.signals import WATCH
from neo_jax.training import loop
from neo_jax.training.interrupt import Interrupt
from neo_jax.training.loop import train

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kills.py"


def handlers():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_does_what_it_did(number, monkeypatch):
    seen = []
    was = signal.signal(number, lambda number, _: seen.append(number))
    before = handlers()
    try:
        with Interrupt() as interrupt:
            assert not interrupt.requested()
            os.kill(os.getpid(), number)
            assert interrupt.requested()
            assert not seen
            monkeypatch.setattr(signals, "_AGAIN", 0)
            os.kill(os.getpid(), number)
            assert seen == [number]
            assert handlers() == before
        with Interrupt() as interrupt:
            assert not interrupt.requested()
        assert handlers() == before
    finally:
        signal.signal(number, was)


def test_terminations_that_follow_at_once_are_one():
    """`timeout` sends two."""
    seen = []
    was = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with Interrupt() as interrupt:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.requested()
            assert not seen
    finally:
        signal.signal(signal.SIGTERM, was)


def test_on_the_command_line_it_is_taken_once_there_is_something_to_save(monkeypatch):
    entered = []
    monkeypatch.setattr(WATCH, "is_on", True)
    monkeypatch.setattr(WATCH, "install", lambda: entered.append("installed"))
    with Interrupt() as interrupt:
        assert entered == ["installed"]  # also where a library took the handlers meanwhile
        assert not WATCH.takes()
        assert interrupt.requested()  # after the first step
        assert WATCH.takes()
    assert WATCH.takes is None


def test_outside_the_main_thread_nothing_is_caught():
    def enter():
        with Interrupt() as interrupt:
            seen.append((handlers() == before, interrupt.requested()))

    before, seen = handlers(), []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(config, monkeypatch):
    feed = loop.batches

    def signalling(*args, **options):
        for i, batch in enumerate(feed(*args, **options)):
            if i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(loop, "batches", signalling)
    assert int(train(config).step) == 2
    output = Path(config.output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["2"]
    assert not (output / "model").exists()
    monkeypatch.undo()
    assert int(train(config).step) == 6
    assert (output / "model").exists()


def test_killed_runs_end_where_others_do():
    """`benchmarks/kills.py`, in short; without options it kills all that writes."""
    options = ["--jobs", "train", "--kills", "2", "--terms", "0", "--steps", "40"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(
        r"  2 signals.*, a full disk: what is left is the same, byte for byte", last
    )
