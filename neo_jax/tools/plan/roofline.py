"""The least time that a step can take, by what is published of the chip.

Each resource is taken to be busy all the time, next to the others (Williams, Waterman and
Patterson, "Roofline", 2009), so the slowest decides.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from neo_jax.devices.chips import Chip
from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.hlo_cost import Work


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds a step, NaN where the chip's figures are not known."""

    products: float  # of matrices, at the peak of bfloat16
    memory: float
    interconnect: float  # between neighbours in a slice
    network: float  # between slices

    @property
    def step(self) -> float:
        """The slowest of them."""
        times = dataclasses.astuple(self)
        return math.nan if any(map(math.isnan, times)) else max(times)

    @property
    def slowest(self) -> str:
        """Its name."""
        times = self.milliseconds
        return max(times, key=lambda name: times[name])

    @property
    def milliseconds(self) -> dict[str, float]:
        """The times by name, in milliseconds."""
        return {name: 1e3 * seconds for name, seconds in dataclasses.asdict(self).items()}


def roofline(chip: Chip, work: Work, traffic: Sequence[Traffic]) -> Roofline:
    """Returns the times of a step, of what a device does and sends.

    A ring along one axis of the mesh sends by two links, one each way, and rings along different
    axes one after another; this is a bound where the axis is a ring of neighbours.
    """
    seconds = {False: 0.0, True: 0.0}
    for row in traffic:
        speed = chip.network_bandwidth if row.between_slices else 2 * chip.link_bandwidth
        seconds[row.between_slices] += row.wire_bytes / speed if row.wire_bytes else 0.0
    return Roofline(
        work.flops / chip.peak_flops,
        work.memory_bytes / chip.memory_bandwidth,
        seconds[False],
        seconds[True],
    )


def slices_of(mesh: Mesh) -> dict[str, int]:
    """Returns the axes of a mesh that lead to other TPU slices, and along each to how many."""
    number = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0)(mesh.devices)
    along = {
        name: len(set(np.moveaxis(number, axis, -1).reshape(-1, size)[0]))
        for axis, (name, size) in enumerate(mesh.shape.items())
    }
    return {name: slices for name, slices in along.items() if slices > 1}


def utilisation(chip: Chip, roof: Roofline, useful_flops: float) -> float:
    """Returns the share of the peak that useful products have, at the roofline's time: MFU.

    Chowdhery et al., "PaLM", 2022, appendix B.
    """
    return useful_flops / chip.peak_flops / roof.step
