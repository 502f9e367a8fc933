"""Several processes, one run: joining the others, and what all of them do together.

Every process runs the same program. Process 0 leads: it alone prints and writes what is not
sharded. Joining must come before anything that makes JAX look for devices.
"""

import contextlib
import hashlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from neo_jax.axes import Array
from neo_jax.errors import NeoError
from neo_jax.files.locks import locked

HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as dead
START_TIMEOUT = 300  # seconds in which all processes must come
_TRIES = 5  # a network file system may tell of a new file a little later


def join(
    coordinator: str = "auto",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
    start_timeout: int = START_TIMEOUT,
) -> bool:
    """Joins the other processes of this run; returns whether there are others.

    Without a cluster it reads environment variables only: no network, no time.

    Args:
      coordinator: "auto" joins what JAX detects: Cloud TPU, GKE, Slurm, Open MPI; "mpi4py" any MPI
        that this package knows; "none" runs alone; else HOST:PORT of process 0.
      num_processes: of the run, with HOST:PORT.
      process_id: of this one, with HOST:PORT.
      heartbeat_timeout: all processes end at most so many seconds after one of them died.
      start_timeout: seconds to wait for the others, after which JAX ends the process.

    Raises:
      NeoError: an invalid address or number, or a cluster that does not answer.
    """
    _check(coordinator, num_processes, process_id, min(heartbeat_timeout, start_timeout))
    if coordinator == "none" or num_processes == 1 or (coordinator == "auto" and _is_alone()):
        return False
    where: dict[str, Any] = {}
    if coordinator == "mpi4py":
        where = {"cluster_detection_method": "mpi4py"}
    elif coordinator != "auto":
        if process_id == 0:
            _check_port(coordinator)
        where = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
            "cluster_detection_method": "deactivate",
        }
    # It would keep SIGTERM from ending a process, for a checkpoint on which nobody has agreed.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **where,
            # JAX counts from the last sign of life, and then has to notice and to act.
            heartbeat_timeout_seconds=max(1, 3 * heartbeat_timeout // 4),
            initialization_timeout=start_timeout,
        )
    except Exception as error:  # a metadata server, a package of the cluster: anything may go wrong
        if coordinator == "auto" and "coordinator_address should be defined" in str(error):
            return False  # no cluster
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NeoError(
            f"cannot join the other processes: {reason.rstrip('.')}; give --coordinator HOST:PORT "
            "--num-processes N --process-id I, or --coordinator none to run alone."
        ) from error
    return jax.process_count() > 1


def num_tasks() -> int:
    """Returns how many processes Slurm or Open MPI started with this one; 0 where neither did."""
    number = os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "0"
    return int(number) if number.isdecimal() else 0


def _is_alone() -> bool:
    """Returns whether the environment names this process as the only one.

    JAX's detection would wait for others in an interactive shell of Slurm, give a lone process of
    Slurm or Open MPI a single GPU of its host, and look for a lone TPU host in the DNS.
    """
    env = os.environ
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ","
    lone_host = "," not in hosts and env.get("MEGASCALE_NUM_SLICES", "1") == "1"
    return num_tasks() == 1 or lone_host


def _check(coordinator: str, num_processes: int, process_id: int, timeout: int) -> None:
    if timeout < 1:
        raise NeoError("timeouts are whole seconds, at least 1.")
    if coordinator in ("auto", "none", "mpi4py"):
        if num_processes or process_id >= 0:
            raise NeoError(
                "the number of processes goes with the address of process 0; add --coordinator "
                "HOST:PORT."
            )
        return
    found = re.fullmatch(r"[\w.-]+:([0-9]{1,5})|\[[0-9a-fA-F:]+\]:([0-9]{1,5})", coordinator)
    if not found or not 0 < int(found[1] or found[2]) < 2**16:
        raise NeoError(
            f"the coordinator '{coordinator}' is not auto, none, mpi4py or HOST:PORT; give the "
            "address of process 0, as in --coordinator 10.0.0.1:8476."
        )
    if not 0 <= process_id < num_processes:
        raise NeoError(
            f"process {process_id} is not one of {num_processes}; give --num-processes N and "
            "--process-id I, from 0 to N - 1."
        )


def _check_port(coordinator: str) -> None:
    """Tries the port that process 0 will listen on: JAX crashes where it is taken."""
    port = int(coordinator.rpartition(":")[2])
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        raise NeoError(
            f"process 0 cannot listen on port {port} ({error.strerror}); end what uses it, or "
            "choose another port for all processes."
        ) from error


def is_leader() -> bool:
    """Returns whether this process prints and writes: the only one, or the first of several."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints a line on stderr, where this process leads."""
    if is_leader():
        print(line, file=sys.stderr, flush=True)


def to_host(array: Array) -> np.ndarray:
    """Returns the whole array; where several processes hold parts of it, all must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def from_leader(array: np.ndarray) -> np.ndarray:
    """Returns process 0's array to all; all processes must call this with one shape."""
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def check_same(what: str) -> None:
    """Checks that all processes say the same; all must call this.

    Raises:
      NeoError: in those that say something else than process 0; the others may wait for these.
    """
    digest = np.frombuffer(hashlib.sha256(what.encode()).digest(), np.int32)
    if not np.array_equal(from_leader(digest), digest):
        raise NeoError(
            "process 0 runs another command or another version of neo_jax; start the same for all."
        )


@contextlib.contextmanager
def holding(output: Path, inside: bool = False) -> Iterator[None]:
    """Locks an output for this run, by process 0 alone; all must call this. See `locked`.

    Raises:
      NeoError: in all processes, where another run holds it or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        error = None
        try:
            if is_leader():
                stack.enter_context(locked(output, inside))
        except NeoError as caught:
            error = caught
        if not all_processes(error is None):
            raise error or NeoError(f"process 0 cannot write {output}; it says why.")
        yield


def barrier(name: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(name)


def check_shared(folder: Path) -> None:
    """Checks that all processes of the run see the same folder; all must call this.

    Raises:
      NeoError: some do not; the run would wait for itself at its first checkpoint.
    """
    if jax.process_count() == 1:
        return
    number = int(from_leader(np.array(secrets.randbits(31), np.int32)))
    probe = folder / f".shared-{number}"
    if is_leader():
        probe.write_text("All processes of a run must see this.\n")
    barrier("written")
    for _ in range(_TRIES):
        if seen := probe.exists():
            break
        time.sleep(1)
    everywhere = all_processes(seen)
    if is_leader():
        probe.unlink()
    if not everywhere:
        raise NeoError(
            f"the processes of this run do not see one folder {folder}; choose an output on a "
            "file system that all share, or on gs://."
        )


def all_processes(here: bool) -> bool:
    """Returns whether this is true in every process; all must call this."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(here).all())
