"""How many sequences a server can write at a time, and how fast, on devices that are not here."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from neo_jax.devices.memory import tree_bytes
from neo_jax.errors import NeoError
from neo_jax.tools.plan.compilation import compile_for
from neo_jax.tools.plan.plan import Plan, capacity, make_plan
from neo_jax.tools.plan.steps import Step
from neo_jax.tools.plan.topology import Topology

Build = Callable[[int], Step]
"""Builds the step of a server for a number of sequences."""

_FIRST = (1, 8)
"""Rows of the steps that are compiled first, in units of what the mesh splits."""

_MOST = 4096  # sequences that are considered
_TRIES = 3


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that writes so many sequences, by the compiled step."""

    plan: Plan
    memory: int  # the most bytes of a device at a time, between steps too
    inserting: int  # of it temporaries of what puts prompts into rows

    @property
    def rows(self) -> int:
        """Sequences."""
        return self.plan.step.rows

    @property
    def fits(self) -> bool:
        """Whether the devices have the memory."""
        return self.plan.fits and not self.memory > self.plan.memory.capacity


def served(step: Step, topology: Topology, prefix_bytes: int) -> Served:
    """Compiles the step of a server, which keeps so many bytes of what prompts began with."""
    plan = make_plan(step, topology)
    if plan.refusal:
        return Served(plan, plan.memory.total, 0)
    assert step.trace_between is not None
    inserting = compile_for(step.trace_between().lower(), topology).temporaries
    beside = _beside(step, topology, prefix_bytes, plan.memory.temporaries or 0, inserting)
    return Served(plan, plan.memory.total + beside, inserting)


def plan_server(build: Build, topology: Topology, prefix_bytes: int) -> Sequence[Served]:
    """Returns servers of one sequence or few, of eight times these, and of as many as fit.

    Raises:
      NeoError: not even the first fit.
    """
    unit = build(1).rows
    found = [served(build(unit * units), topology, prefix_bytes) for units in _FIRST]
    if not found[0].fits:
        raise NeoError(
            "not even one sequence fits; take more devices, --quantize int8, or a smaller --length."
        )
    known = [*found]
    limit = _MOST // unit
    for _ in range(_TRIES):
        units = _most(build, unit, limit, known, topology, prefix_bytes)
        if unit * units <= found[-1].rows and found[-1].fits:
            break
        tried = served(build(unit * units), topology, prefix_bytes)
        if tried.fits:
            found = [*found[: len(_FIRST)], tried]
        else:
            limit = min(limit, units - max(units // 50, 1))
        known.append(tried)
    return [each for each in found if each.fits]


def _most(
    build: Build,
    unit: int,
    limit: int,
    known: Sequence[Served],
    topology: Topology,
    prefix_bytes: int,
) -> int:
    """Returns how many units fit, up to a limit, where temporaries grow as in the steps known."""
    sizes = [
        (each.rows, np.array([each.plan.memory.temporaries, each.inserting]))
        for each in known
        if not each.plan.refusal
    ]
    few, many = sorted([(0, np.zeros(2)), *sizes], key=lambda each: each[0])[-2:]
    rate = np.maximum(many[1] - few[1], 0) / (many[0] - few[0])

    def too_many(units: int) -> bool:
        step = build(unit * units)
        grown = many[1] + rate * (step.rows - many[0])
        temporaries, inserting = (max(int(each), 0) for each in grown)
        held = sum(step.part_bytes(tiled=not topology.is_here).values()) + temporaries
        beside = _beside(step, topology, prefix_bytes, temporaries, inserting)
        return held + beside > capacity(topology)

    return bisect.bisect_left(range(1, limit + 1), True, key=too_many)


def _beside(
    step: Step, topology: Topology, prefix_bytes: int, temporaries: int, inserting: int
) -> int:
    """Returns what a device holds next to a step and its temporaries, at most."""
    tiled = not topology.is_here
    reading = step.beside["prompts being read"]
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(reading))
    kept = prefix_bytes * tree_bytes(reading, tiled=False) // whole  # laid out as these are
    # What is begun next has its temporaries at once, before the old batch is gone.
    between = tree_bytes(step.between, tiled) + inserting
    return tree_bytes(reading, tiled) + kept + max(between - temporaries, 0)
