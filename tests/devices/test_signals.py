"""devices/signals.py: commands that are interrupted at any moment end with a line and 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import neo_jax
from neo_jax import cli
from neo_jax.devices.signals import STATUS, WATCH

ROOT = Path(neo_jax.__file__).parents[1]
SCRIPT = """
import contextlib, os, signal, sys, time
from neo_jax.devices import signals
from neo_jax.devices.signals import WATCH

def ready():
    print("ready", flush=True)

def busy(seconds=60):  # between two instructions all the time
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

WATCH.start()
"""
LINE = "neo-jax: interrupted\n"


def interrupted(body, *numbers):
    """Runs a script, sends it signals once it is ready; returns its status, stdout and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + body],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for number in numbers:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_a_verb_has_begun_the_process_ends_at_once(number):
    assert interrupted("ready(); busy()", number) == (STATUS, "", LINE)


LEAVING = """
try:
    with WATCH.inside():
        try:
            ready(); busy()
        finally:
            print("left")
except KeyboardInterrupt:
    WATCH.tell() and print("neo-jax: interrupted", file=sys.stderr)
WATCH.end(1)
"""


@pytest.mark.parametrize("wait", ["busy()", "time.sleep(60)"])
def test_a_verb_leaves_things_as_they_are_to_be_left(wait):
    body = LEAVING.replace("busy()", wait)
    assert interrupted(body, signal.SIGTERM) == (STATUS, "left\n", LINE)


@pytest.mark.parametrize(
    "module", ["jax._src.interpreters.mlir", "sentencepiece", "importlib", "weakref"]
)
def test_nothing_is_raised_where_it_would_be_lost(module):
    """Neither in such a frame nor in one that it called."""
    body = f"""
signals._REACH = 0.1
exec("def lowering(callback): callback()", callback_of := {{"__name__": {module!r}}})
with WATCH.inside():
    try:
        callback_of["lowering"](lambda: (ready(), busy()))
    finally:
        print("raised")
"""
    assert interrupted(body, signal.SIGINT) == (STATUS, "", LINE)


def test_a_safe_place_that_comes_later_is_found():
    body = """
exec("def lowering(callback): callback()", callback_of := {"__name__": "jax.x"})
try:
    with WATCH.inside():
        try:
            callback_of["lowering"](lambda: (ready(), busy(0.5)))
            print("went on")
            busy()
        finally:
            print("left")
except KeyboardInterrupt:
    WATCH.end(1)
"""
    assert interrupted(body, signal.SIGINT) == (STATUS, "went on\nleft\n", LINE)


def test_one_that_ends_before_a_safe_place_says_the_line_too():
    body = """
signals._POLL = 60
exec("def lowering(callback): callback()", callback_of := {"__name__": "jax.x"})
with WATCH.inside():
    callback_of["lowering"](lambda: (ready(), busy(0.3)))
print("done")
WATCH.end(0)
"""
    assert interrupted(body, signal.SIGINT) == (STATUS, "done\n", LINE)


def test_the_line_is_shown_where_stderr_is_redirected():
    """As it is while options are read."""
    body = "import io\nwith contextlib.redirect_stderr(io.StringIO()): ready(); busy()"
    assert interrupted(body, signal.SIGTERM) == (STATUS, "", LINE)


def test_the_line_may_say_what_is_kept():
    body = 'WATCH.hint = "; 2 are kept"; ready(); busy()'
    assert interrupted(body, signal.SIGINT) == (STATUS, "", "neo-jax: interrupted; 2 are kept\n")


@pytest.mark.parametrize("swallowed", [True, False])
def test_one_that_does_not_come_out_is_ended(swallowed):
    body = f"""
signals._LEAVE = 0.1
with WATCH.inside():
    try:
        ready(); busy()
    except BaseException:
        {"busy()" if swallowed else "time.sleep(60)"}
"""
    assert interrupted(body, signal.SIGINT) == (STATUS, "", LINE)


TAKING = """
def take():
    ready()
    return {taken}

try:
    with WATCH.inside(), signals.taken(take):
        ready(); busy({seconds})
        print("went on")
finally:
    WATCH.end(0)
"""


def test_what_takes_signals_gets_the_first():
    body = TAKING.format(taken=True, seconds=0.3)
    assert interrupted(body, signal.SIGTERM) == (0, "ready\nwent on\n", "")


@pytest.mark.parametrize(("taken", "signals"), [(True, 2), (False, 1)])
def test_what_does_not_take_it_and_the_second_end(taken, signals):
    body = TAKING.format(taken=taken, seconds=60)
    status, out, _ = interrupted(body, *[signal.SIGINT] * signals)
    assert (status, out) == (STATUS, "" if taken else "ready\n")


def test_a_second_termination_at_once_is_the_first():
    body = TAKING.format(taken=True, seconds=0.5)
    assert interrupted(body, signal.SIGTERM, signal.SIGTERM) == (0, "went on\n", "")
    later = "signals._AGAIN = 0\n" + TAKING.format(taken=True, seconds=60)
    assert interrupted(later, signal.SIGTERM, signal.SIGTERM)[:2] == (STATUS, "")


def test_a_job_in_the_background_goes_on_ignoring_interrupts():
    body = "ready(); busy(0.3); print('done'); WATCH.end(0)"
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", ignoring + SCRIPT + body],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("done\n", None)
    assert process.returncode == 0


def test_a_command_that_has_ended_has_its_own_status():
    body = """
class Last:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"ready\\n")
        sleep(0.3)

last = Last()
WATCH.end(0)
"""
    assert interrupted(body, signal.SIGTERM) == (0, "", "")


def test_a_verb_is_a_place_where_an_interrupt_may_come_out(monkeypatch):
    seen = []
    monkeypatch.setattr("neo_jax.cli.info.main", lambda _: seen.append(WATCH._inside))
    assert cli.main(["info"]) == 0
    assert (seen, WATCH._inside) == ([True], False)


def test_a_program_that_uses_the_package_keeps_its_handlers():
    assert not WATCH.is_on
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert WATCH.tell()
    assert WATCH.tell()


@pytest.mark.parametrize("delay", [0, 0.1, 0.5])
def test_the_command_line_says_a_line(delay):
    """At its first instruction, and where it imports what it needs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "neo_jax", "generate", "Hello", "--temperature", "0.5"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        process.kill()
        pytest.skip("needs /proc, to see when a process has its handlers")
    while not int(status.read_text().split("SigCgt:")[1].split()[0], 16) >> 14 & 1:
        assert process.poll() is None
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", LINE)
    assert process.returncode == STATUS
