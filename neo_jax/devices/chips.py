"""What is published of chips: one small table.

Figures are of one JAX device, which is a chip, or half of one where a chip is two devices (TPU v2,
v3 and 7x). NaN stands for what we found no source of. Sources: Google Cloud's pages of each TPU
(docs.cloud.google.com/tpu/docs/v5e and so on: peak, memory, its bandwidth, and the interconnect of
v5e, v5p and v6e, of both directions and all ports together, here of one direction of one port);
"How to Scale Your Model" (Austin et al., 2025), chapter 2, for the interconnect of v3 and v4;
NVIDIA's data sheets.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device can do."""

    peak_flops: float  # of dense products of bfloat16, a second
    memory: float = math.nan  # bytes
    memory_bandwidth: float = math.nan  # bytes a second
    link_bandwidth: float = math.nan  # bytes a second that leave by one link to a neighbour
    network_bandwidth: float = math.nan  # bytes a second to other slices, its share of a host's


_GIB = 2**30

_TPU_V5E = Chip(197e12, 16 * _GIB, 819e9, 50e9, 3.125e9)
_TPU_V5P = Chip(459e12, 95 * _GIB, 2765e9, 100e9, 6.25e9)
_TPU_V6E = Chip(918e12, 32 * _GIB, 1638e9, 100e9)

CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * _GIB),
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 50e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1200e9, 45e9),
    "TPU v5 lite": _TPU_V5E,
    "TPU v5e": _TPU_V5E,
    "TPU v5": _TPU_V5P,
    "TPU v5p": _TPU_V5P,
    "TPU v6 lite": _TPU_V6E,
    "TPU v6e": _TPU_V6E,
    "TPU7x": Chip(1153.5e12, 96 * _GIB),
    "Tesla T4": Chip(65e12, 16e9, 300e9),
    "NVIDIA L4": Chip(121e12, 24e9, 300e9),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40e9, 1555e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80e9, 2039e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80e9, 3350e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4800e9),
}
"""By JAX's `device_kind`."""

UNKNOWN = Chip(math.nan)
"""A device that is not in the table; a CPU is one."""


BFLOAT16_CAPABILITY = 8.0
"""From this compute capability on NVIDIA GPUs multiply bfloat16 and have flash attention."""


def compute_capability(device: Any) -> float:
    """Returns an NVIDIA GPU's compute capability; NaN of what is none."""
    try:
        return float(getattr(device, "compute_capability", math.nan))
    except ValueError:  # of other makers
        return math.nan


def chip(device_kind: str) -> Chip:
    """Returns what is known of a device."""
    return CHIPS.get(device_kind, UNKNOWN)
