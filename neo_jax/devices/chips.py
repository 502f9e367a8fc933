"""What is published of chips, and what programs reach of it: one small table.

Figures are of one JAX device, which is a chip, or half of one where a chip is two devices (TPU v2,
v3 and 7x). NaN stands for what we found no source of. Sources:

- peak, memory, its bandwidth, the interconnect and the network of TPUs: Google Cloud's pages of
  each (docs.cloud.google.com/tpu/docs/v5e, v5p, v6e, tpu7x), which give the interconnect of both
  directions and all ports together, here of one direction of one port; two devices of a TPU7x share
  the ports of their chip, and a v6e's share of its pod's 25.6 Tbit/s is 100 Gbit/s;
- the interconnect of v3 and v4: "How to Scale Your Model" (Austin et al., 2025), chapter 2;
- vector units: the same, appendix C (8 x 128 lanes of two ALUs up to v4, of four since), times the
  clock: 940 MHz of v3 and 1050 MHz of v4 (Jouppi et al., "TPU v4", 2023), 1.5 GHz of v5e (chapter
  2), and of others what the peak is of so many multipliers: 1.75 GHz of v5p and v6e, 2.2 of 7x;
- GPUs: NVIDIA's data sheets.

What is reached is measured where its comment says so, else fitted: see docs/validation.md.
"""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reached:
    """What programs that run for long reach of the published figures, as shares."""

    products: float = 0.88  # fitted, of v3, v4 and v5p together
    # 3.21 of 3.69 TB/s of a copy of 8 GB on a TPU7x (tpu-recipes, microbenchmarks/ironwood/hbm)
    memory: float = 0.87
    # All-gathers of 0.4 GB on a TPU7x: 178.8 of 200 GB/s (microbenchmarks/ironwood/collectives).
    links: float = 0.89
    # Two rings at once, along two axes of a torus, over one: a sum of 0.6 GB on 256 chips of v6e
    # takes 235.8 GB/s (microbenchmarks/trillium/collectives), which one ring at 0.89 would in 178.
    second_ring: float = 1.32
    # Sums of 0.6 GB between slices of v6e, 4.11 of 12.5 GB/s (the same).
    network: float = 0.33


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device can do."""

    peak_flops: float  # of dense products of bfloat16, a second
    memory: float = math.nan  # bytes
    memory_bandwidth: float = math.nan  # bytes a second
    link_bandwidth: float = math.nan  # bytes a second that leave by one link to a neighbour
    network_bandwidth: float = math.nan  # bytes a second to other slices, its share of a host's
    vector_ops: float = math.nan  # of float32 by the vector units, a second
    reached: Reached = Reached()


_GIB = 2**30

_LANES = 8 * 128  # of a TPU core's vector unit

_V5E_REACHED = Reached(products=0.96)  # fitted
_V5E = Chip(197e12, 16 * _GIB, 819e9, 50e9, 3.125e9, 4 * _LANES * 1.5e9, _V5E_REACHED)
_V5P = Chip(459e12, 95 * _GIB, 2765e9, 100e9, 6.25e9, 2 * 4 * _LANES * 1.75e9)
# Products fitted: of 8192 x 8192 alone they reach 0.90, in long programs less. A copy of 34 MB
# reaches 1360 GB/s (both tpu-recipes, microbenchmarks).
_V6E_REACHED = Reached(products=0.73, memory=0.83)
_V6E = Chip(918e12, 32 * _GIB, 1638e9, 100e9, 12.5e9, 4 * _LANES * 1.75e9, _V6E_REACHED)
# Products of 32768 x 32768 (tpu-recipes, microbenchmarks/ironwood).
_7X_REACHED = Reached(products=0.829)
_7X = Chip(1153.5e12, 96 * _GIB, 3690e9, 50e9, 6.25e9, 4 * _LANES * 2.2e9, _7X_REACHED)

CHIPS = {
    "TPU v2": Chip(22.5e12, 8 * _GIB),
    "TPU v3": Chip(61.5e12, 16 * _GIB, 450e9, 50e9, vector_ops=2 * _LANES * 0.94e9),
    "TPU v4": Chip(275e12, 32 * _GIB, 1200e9, 45e9, vector_ops=2 * 2 * _LANES * 1.05e9),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _7X,
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


OLD_TPUS = ("TPU v2", "TPU v3")
"""Whose compiler takes no kernel that multiplies bfloat16, by JAX's `device_kind`."""

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
