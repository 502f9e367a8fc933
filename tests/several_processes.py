"""Runs of several processes: how tests start them, and what becomes of them."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import neo_jax

HEARTBEAT = 10


class Runs:
    """Processes that were started; ends them with the context."""

    def __init__(self, scratch):
        self._scratch, self._started = scratch, []

    def __call__(self, *args, count=2, come=2, devices=4, **more):
        """Starts Python in processes that are to be one run."""
        address = f"localhost:{free_port()}"
        environment = {
            **{
                name: os.environ[name]
                for name in os.environ
                if not re.search("(?i)proxy|^TPU_", name)
            },
            "PYTHONPATH": str(Path(neo_jax.__file__).parents[1]),
            "XDG_CACHE_HOME": str(self._scratch / "cache"),
            "TMPDIR": str(self._scratch),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles in half the time
            **more,
        }
        processes = []
        for i in range(min(count, come)):
            where = ["--coordinator", address, "--num-processes", count, "--process-id", i]
            where += ["--heartbeat-timeout", HEARTBEAT]
            command = [sys.executable, *args, *(where if count > 1 else [])]
            processes.append(
                subprocess.Popen(
                    list(map(str, command)),
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        self._started.extend(processes)
        return processes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self._started:
            process.kill()
            process.communicate()


def free_port():
    """A port that nobody listens to."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def ended(process, timeout=100):
    """Waits for a process; returns its exit status, its stdout, and its stderr as lines."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err.splitlines()
