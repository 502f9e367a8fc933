"""Devices of TPUs that are not there, for which the real compiler compiles."""

import functools
import os

from jax.experimental import topologies

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no cloud to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device, so nothing to fight for


@functools.cache
def tpu_devices(name):
    """The devices of a topology such as "v5e:2x2"; needs `libtpu`."""
    one = {"chips_per_host_bounds": [1, 1, 1]} if name.endswith(":1x1") else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **one).devices
