"""Devices to compile for that need not be here, by a name such as "v5e:4x4"."""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from neo_jax.devices.chips import Chip, chip
from neo_jax.errors import NeoError, suggest

_KINDS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")  # of TPUs, by JAX's names
_MOST_DEVICES = 2**16  # each is an object; the largest TPUs have some ten thousand
_EXAMPLES = "v5e:4x4, v4:2x2x1, 2*v5e:16x16 (two slices) or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices that programs can be compiled for."""

    name: str
    devices: Sequence[jax.Device]
    chip: Chip

    @property
    def is_here(self) -> bool:
        """Whether its devices are of this machine: CPUs, that is."""
        return self.devices[0].platform == "cpu"


_NUMBER = "[1-9][0-9]{0,4}"


def find_topology(name: str) -> Topology:
    """Returns the devices of a topology: a kind of TPU and the shape of a slice in chips.

    "2*" before it stands for two slices, joined by the network; "cpu:8" is eight devices of this
    machine's CPU.

    Raises:
      NeoError: there is no such topology, libtpu is missing, or JAX was started with fewer CPU
        devices.
    """
    match = re.fullmatch(rf"(?:({_NUMBER})\*)?(\w+):({_NUMBER}(?:x{_NUMBER})*)", name)
    if not match or (match[2] == "cpu" and not match[3].isdecimal()):
        raise NeoError(f"'{name}' is not a topology; write for example {_EXAMPLES}.")
    slices, kind, shape = match.groups()
    if math.prod(map(int, (slices or "1", *shape.split("x")))) > _MOST_DEVICES:
        raise NeoError(f"'{name}' has more than {_MOST_DEVICES} devices; name fewer.")
    devices = _cpu_devices(int(shape)) if kind == "cpu" else _tpu_devices(slices, kind, shape)
    return Topology(name, devices, chip(devices[0].device_kind))


def _cpu_devices(number: int) -> list[jax.Device]:
    devices = jax.devices("cpu")
    if number > len(devices):
        raise NeoError(
            f"cpu:{number} needs {number} CPU devices, and JAX was started with {len(devices)}; "
            f"call jax.config.update('jax_num_cpu_devices', {number}) before anything else."
        )
    return devices[:number]


def _tpu_devices(slices: str | None, kind: str, shape: str) -> Sequence[jax.Device]:
    if kind not in _KINDS:
        raise NeoError(
            f"no TPU is called '{kind}'.{suggest(kind, [*_KINDS, 'cpu'])} Topologies are written "
            f"as {_EXAMPLES}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise NeoError("planning for TPUs needs their compiler: pip install 'neo_jax[tpu]'.")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if kind == "v4":  # else half a chip is a device, as it is not in use
        options["chip_config_name"] = "megacore"
    if shape == "1x1":
        options["chips_per_host_bounds"] = [1, 1, 1]
    if slices:
        options["num_slices"] = int(slices)
    try:
        with _no_tpu_here():
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{shape}", **options
            )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise NeoError(f"there is no topology {kind}:{shape} ({reason}).") from None
    return found.devices


@contextlib.contextmanager
def _no_tpu_here() -> Iterator[None]:
    """Within, the environment says where it does not yet that this machine is no TPU host.

    The compiler, as it starts, looks for the TPU that it runs on and for other processes that use
    it. What is left of this would tell later calls, as `distributed.join`, of a TPU of one host.
    """
    added = {name: value for name, value in _VARIABLES.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
