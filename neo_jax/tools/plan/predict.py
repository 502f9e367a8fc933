"""How long a step takes: its instructions one after another, each at what its chip reaches.

`roofline` tells the least that published peaks allow, with every resource busy all the time. A
device runs one instruction at a time, and each is bound by products, by its vector units or by
memory; collectives run next to them, for a part. docs/validation.md compares with published runs.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from neo_jax.config import ModelConfig
from neo_jax.devices.chips import Chip
from neo_jax.tools.plan.collectives import Traffic, located
from neo_jax.tools.plan.hlo import Program
from neo_jax.tools.plan.hlo_cost import Work, works

LAUNCH = 1.6e-6
"""Seconds of an instruction that does next to nothing: a product of 128 x 128 on a TPU7x
(tpu-recipes, microbenchmarks/ironwood)."""

LATENCY = 13e-6
"""Seconds of a collective that sends next to nothing: of all-gathers of 1.6 and 6.3 MB on a TPU7x
the time that does not grow with the bytes (tpu-recipes, microbenchmarks/ironwood/collectives)."""

EXPOSED = 0.89
"""The share of collectives' time in which a device waits; fitted, see docs/validation.md."""


class Phase(NamedTuple):
    """What a device does between two points at which it waits for all that was sent."""

    works: list[tuple[float, Work]]  # how often each runs, and what it takes then
    traffic: list[Traffic]


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of a step by what bounds its instructions; NaN where the chip is not known."""

    products: float  # of matrices
    vectors: float  # operations of attention's kernels on logits
    memory: float
    waiting: float  # for collectives
    collectives: float  # all of them, also what runs next to instructions: no part of the step

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.products + self.vectors + self.memory + self.waiting

    @property
    def parts(self) -> dict[str, float]:
        """What a step consists of, in seconds."""
        names = ("products", "vectors", "memory", "waiting")
        return {name: getattr(self, name) for name in names}


def predict(chip: Chip, phases: Iterable[Phase], exposed: float = EXPOSED) -> Prediction:
    """Returns how long phases take one after another; `exposed` is the share that is waited for."""
    spent = {"products": 0.0, "vectors": 0.0, "memory": 0.0}
    waiting = collectives = 0.0
    for phase in phases:
        busy = 0.0
        for times, work in phase.works:
            name, seconds = bound(chip, work)
            spent[name] += times * seconds
            busy += times * seconds
        sent = sum(collective_seconds(chip, row) for row in phase.traffic)
        collectives += sent
        waiting += exposed * sent + max((1 - exposed) * sent - busy, 0)
    return Prediction(**spent, waiting=waiting, collectives=collectives)


def bound(chip: Chip, work: Work) -> tuple[str, float]:
    """Returns what bounds an instruction and its seconds, which are 0 where it does nothing."""
    reached = chip.reached
    flops = work.flops + work.hidden_flops
    times = {
        "products": flops / (chip.peak_flops * reached.products),
        "vectors": work.vector_ops / chip.vector_ops if work.vector_ops else 0.0,
        "memory": work.memory_bytes / (chip.memory_bandwidth * reached.memory),
    }
    if not any(work):
        return "memory", 0.0
    name = max(times, key=lambda name: times[name])
    unknown = any(map(math.isnan, times.values()))
    return name, math.nan if unknown else times[name] + LAUNCH


def collective_seconds(chip: Chip, row: Traffic) -> float:
    """Returns the seconds of all times that a collective runs."""
    if not row.wire_bytes:
        return 0.0
    if row.between_slices:
        return row.wire_bytes / (chip.network_bandwidth * chip.reached.network)
    speed = row.links * chip.link_bandwidth * chip.reached.links
    return row.wire_bytes / speed + row.times * LATENCY


def compiled_phases(
    program: Program,
    config: ModelConfig | None,
    mesh_shape: Mapping[str, int],
    open_trips: int,
    slices: Mapping[str, int],
    largest: int = 0,
) -> list[Phase]:
    """Returns the phases of a compiled program: the body of each loop, and what is in none.

    `largest` is the side of the blocks of attention, 0 what is usual.
    """
    found: dict[tuple[str, ...], Phase] = {}
    for run, work in works(program, config, open_trips, largest):
        found.setdefault(run.path, Phase([], [])).works.append((run.known_times, work))
    for run, row in located(program, mesh_shape, open_trips, slices):
        found.setdefault(run.path, Phase([], [])).traffic.append(row)
    return list(found.values())
