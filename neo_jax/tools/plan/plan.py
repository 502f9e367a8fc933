"""A plan: a step is traced, compiled for a topology, and what came out is counted."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from neo_jax.devices.chips import Chip
from neo_jax.devices.memory import device_memory
from neo_jax.tools.plan.collectives import Traffic, traffic
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.hlo_cost import Work, work
from neo_jax.tools.plan.kernels import block_side
from neo_jax.tools.plan.predict import Prediction, compiled_phases, predict
from neo_jax.tools.plan.steps import OPEN_TRIPS, Step
from neo_jax.tools.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device."""

    parts: dict[str, int]  # parameters, optimizer and the like, by arithmetic, in tiles
    parts_without_padding: dict[str, int]
    arguments: int | None  # what the compiler says of all parts; None where it refused
    temporaries: int | None  # activations, gradients and what else lives within a step
    total: int  # the most at a time, as the compiler says
    capacity: float  # of a device; NaN where it is not known
    code: int = 0  # the program itself


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The least seconds that a step takes by what is published; NaN where that is not known.

    Each resource is taken to be busy all the time, next to the others (Williams, Waterman and
    Patterson, "Roofline", 2009), so the slowest decides.
    """

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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes of each device; of its program nothing where the compiler refused."""

    step: Step
    topology: Topology
    memory: Memory
    useful_flops: float  # of products without those that are computed again
    repeated_flops: float  # of products that are computed again to save memory
    compile_seconds: float
    refusal: str = ""  # in the compiler's words, where it refuses what does not fit
    work: Work | None = None
    traffic: Sequence[Traffic] = ()
    roofline: Roofline | None = None
    prediction: Prediction | None = None
    program: str = dataclasses.field(default="", repr=False)  # the compiled program's text

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory."""
        return not self.refusal and not self.memory.total > self.memory.capacity


def make_plan(step: Step, topology: Topology) -> Plan:
    """Compiles a step for the devices of its strategy.

    Raises:
      NeoError: the step cannot be, whatever its size.
    """
    config, devices = step.model.config, len(topology.devices)
    traced = step.trace()
    flops = useful = traced_flops(traced, config) / devices
    if step.trace_useful is not step.trace:
        useful = traced_flops(step.trace_useful(), config) / devices
    repeated = flops - useful
    compiled = compile_for(traced.lower(), topology)
    if compiled.refusal:
        memory = _refused(step, topology, compiled.refusal)
        reason = " ".join(compiled.refusal.split(".\n")[0].split())
        return Plan(step, topology, memory, useful, repeated, compiled.seconds, reason)
    program, slices = parse(compiled.text), slices_of(step.mesh)
    done = work(program, config, OPEN_TRIPS)
    sent = traffic(program, step.mesh.shape, OPEN_TRIPS, slices)
    memory = Memory(
        *_parts(step, topology), compiled.arguments, compiled.temporaries, compiled.total,
        capacity(topology), compiled.code,
    )  # fmt: skip
    roof = roofline(topology.chip, done, sent)
    side = block_side(step.model.kernel)
    phases = compiled_phases(program, config, step.mesh.shape, OPEN_TRIPS, slices, side)
    return Plan(
        step, topology, memory, useful, repeated, compiled.seconds, "", done, sent, roof,
        predict(topology.chip, phases), compiled.text,
    )  # fmt: skip


def _refused(step: Step, topology: Topology, message: str) -> Memory:
    parts, without_padding = _parts(step, topology)
    total, there = float(sum(parts.values())), topology.chip.memory
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    said = [float(n) * units[unit] for n, unit in re.findall(r"\b([\d.]+)([KMG])\b", message)]
    if len(said) >= 2:
        total, there = said[:2]  # what is needed, what is there
    return Memory(parts, without_padding, None, None, int(total), there)


def capacity(topology: Topology) -> float:
    """Returns the memory of a device in bytes; NaN where it is not known."""
    return device_memory(len(topology.devices)) if topology.is_here else topology.chip.memory


def _parts(step: Step, topology: Topology) -> tuple[dict[str, int], dict[str, int]]:
    return step.part_bytes(tiled=not topology.is_here), step.part_bytes(tiled=False)


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


def utilisation(chip: Chip, times: Roofline | Prediction, useful_flops: float) -> float:
    """Returns the share of the peak that useful products have in a step of that time: MFU.

    Chowdhery et al., "PaLM", 2022, appendix B.
    """
    return useful_flops / chip.peak_flops / times.step
