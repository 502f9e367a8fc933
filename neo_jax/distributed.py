"""Several processes, one run: joining the others, and what all of them do together.

Every process runs the same program. Process 0 leads: it alone prints and writes what is not
sharded. Joining must come before anything that makes JAX look for devices.
"""

import functools
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from neo_jax.axes import Array
from neo_jax.errors import NeoError

HEARTBEAT_TIMEOUT = 60  # seconds after which a silent process counts as dead
START_TIMEOUT = 300  # seconds in which all processes must come


def join(
    coordinator: str = "auto",
    num_processes: int = 0,
    process_id: int = -1,
    *,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
    start_timeout: int = START_TIMEOUT,
) -> bool:
    """Joins the other processes of this run; returns whether there are others.

    Without a cluster this asks environment variables only: no network, no time.

    Args:
      coordinator: "auto" takes part in what JAX detects: Cloud TPU, GKE, Slurm, Open MPI; "mpi4py"
        asks any MPI by that package; "none" runs alone; else HOST:PORT of process 0.
      num_processes: of the run, with HOST:PORT.
      process_id: which of them this one is, with HOST:PORT.
      heartbeat_timeout: all processes end at most so many seconds after one of them died.
      start_timeout: seconds to wait for the others. JAX ends the process when they are over.

    Raises:
      NeoError: an address or a number that cannot be, or a cluster that cannot be asked.
    """
    if coordinator == "none" or (coordinator == "auto" and _is_alone()):
        return False
    where: dict[str, Any] = {}
    if coordinator == "mpi4py":
        where = {"cluster_detection_method": "mpi4py"}
    elif coordinator != "auto":
        _check(coordinator, num_processes, process_id)
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
            # JAX counts from the last sign of life, and then has to look, to tell and to act.
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


def _is_alone() -> bool:
    """Tells whether what started this process says that it is the only one.

    JAX's detection takes the tasks of the whole allocation for those of the step, so in an
    interactive shell of Slurm it would wait for processes that nobody starts; it gives a process
    of Slurm or Open MPI a single GPU of its host; and it looks for a lone TPU host in the DNS.
    """
    env = os.environ
    if (env.get("OMPI_COMM_WORLD_SIZE") or env.get("SLURM_STEP_NUM_TASKS")) == "1":
        return True
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or ","
    return "," not in hosts and env.get("MEGASCALE_NUM_SLICES", "1") == "1"


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    if not re.fullmatch(r"[^\s]+:[0-9]+", coordinator):
        raise NeoError(
            f"the coordinator '{coordinator}' is not auto, none, mpi4py or HOST:PORT; give the "
            "address of process 0, as in --coordinator 10.0.0.1:8476."
        )
    if not 0 <= process_id < num_processes:
        raise NeoError(
            f"process {process_id} is not one of {num_processes}; give --num-processes N and "
            "--process-id I, from 0 to N - 1."
        )


def is_leader() -> bool:
    """Tells whether this process prints and writes: the only one, or the first of several."""
    return jax.process_index() == 0


def to_host(array: Array) -> np.ndarray:
    """Returns the whole array; where its parts lie on several processes, all must call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    multihost_utils.sync_global_devices(name)


def all_processes(here: bool) -> bool:
    """Tells whether every process says yes; all must call this."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(here).all())


def ask_any(here: bool) -> Array:
    """Starts to ask whether any process says yes; all must call this.

    Returns:
      A boolean scalar. The devices compute it among their other work; reading it waits for that.
    """
    split, any_of = _any_of_all()
    flags = jax.make_array_from_callback((jax.device_count(),), split, lambda _: np.asarray([here]))
    return any_of(flags)


@functools.cache
def _any_of_all() -> tuple[NamedSharding, Any]:
    mesh = jax.make_mesh((jax.device_count(),), ("device",))
    split, whole = (
        NamedSharding(mesh, PartitionSpec("device")),
        NamedSharding(mesh, PartitionSpec()),
    )
    return split, jax.jit(jnp.any, out_shardings=whole)
