"""A plan: a step is traced, compiled for a topology, and what came out is counted."""

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from neo_jax.devices.memory import device_memory, tree_bytes
from neo_jax.tools.plan.collectives import Traffic, traffic
from neo_jax.tools.plan.flops import splash_flops, traced_flops
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.hlo_cost import Work, work
from neo_jax.tools.plan.roofline import Roofline, roofline, slices_of
from neo_jax.tools.plan.steps import OPEN_TRIPS, Step
from neo_jax.tools.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device."""

    parts: dict[str, int]  # parameters, optimizer and the like, by arithmetic, in tiles
    unpadded: dict[str, int]  # the same without the padding of tiles
    arguments: int | None  # what the compiler says of all parts; None where it refused
    temporaries: int | None  # activations, gradients and what else lives within a step
    total: int  # the most at a time, as the compiler says
    capacity: float  # of a device; NaN where it is not known


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes of each device."""

    step: Step
    topology: Topology
    memory: Memory
    fits: bool
    refusal: str  # in the compiler's words, where it refuses what does not fit
    useful_flops: float  # of products without those that are computed again
    repeated_flops: float  # of products that are computed again to save memory
    work: Work | None  # of the compiled program; None where the compiler refused
    traffic: list[Traffic]
    roofline: Roofline | None
    compile_seconds: float
    program_bytes: int  # of the compiled program's text: whether it grows with depth


def compile_and_read(
    lowered: jax.stages.Lowered, topology: Topology
) -> tuple[jax.stages.Compiled, str]:
    """Compiles a program for a topology; returns it and its text.

    The text of a TPU's program is what its compiler writes on the way: `as_text` fails on programs
    that TPUs run in part on their SparseCores.
    """
    if topology.is_here:
        compiled = lowered.compile()
        return compiled, compiled.as_text() or ""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = Path(folder).glob("**/*.after_optimizations.txt")
        return compiled, written.read_text()


def make_plan(step: Step, topology: Topology) -> Plan:
    """Compiles a step for the devices of its strategy.

    Raises:
      NeoError: the step cannot be, whatever its size.
    """
    config, devices = step.model.config, len(topology.devices)
    traced = step.trace()
    useful = traced_flops(step.trace_useful(), config) / devices
    repeated = traced_flops(traced, config) / devices - useful
    lowered = traced.lower()
    start = time.perf_counter()
    try:
        compiled, text = compile_and_read(lowered, topology)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = _refused(step, topology, str(error))
        seconds = time.perf_counter() - start
        reason = " ".join(str(error).split(".\n")[0].split())
        return Plan(step, topology, memory, False, reason, useful, repeated, None, [], None,
                    seconds, 0)  # fmt: skip
    seconds = time.perf_counter() - start
    done = work(parse(text), splash_flops(config), OPEN_TRIPS)
    sent = traffic(text, step.mesh.shape, OPEN_TRIPS, slices_of(step.mesh))
    memory = _memory(step, topology, compiled.memory_analysis())
    return Plan(
        step,
        topology,
        memory,
        not memory.total > memory.capacity,
        "",
        useful,
        repeated,
        done,
        sent,
        roofline(topology.chip, done, sent),
        seconds,
        len(text),
    )


def _memory(step: Step, topology: Topology, told: Any) -> Memory:
    parts, unpadded = _parts(step, topology)
    arguments, temporaries = told.argument_size_in_bytes, told.temp_size_in_bytes
    new = told.output_size_in_bytes - told.alias_size_in_bytes
    total = arguments + temporaries + new + told.generated_code_size_in_bytes
    return Memory(parts, unpadded, arguments, temporaries, total, capacity(topology))


def _refused(step: Step, topology: Topology, message: str) -> Memory:
    parts, unpadded = _parts(step, topology)
    told = re.findall(r"\b([\d.]+)([KMG])\b", message)[:2]  # what is needed, what is there
    total, capacity = (
        [_bytes(*size) for size in told]
        if len(told) == 2
        else (sum(parts.values()), topology.chip.memory)
    )
    return Memory(parts, unpadded, None, None, int(total), capacity)


def capacity(topology: Topology) -> float:
    """Returns the memory of a device in bytes; NaN where it is not known."""
    return device_memory(len(topology.devices)) if topology.is_here else topology.chip.memory


def _bytes(number: str, unit: str) -> float:
    return float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit]


def _parts(step: Step, topology: Topology) -> tuple[dict[str, int], dict[str, int]]:
    tiled = not topology.is_here
    return (
        {name: tree_bytes(tree, tiled) for name, tree in step.parts.items()},
        {name: tree_bytes(tree, False) for name, tree in step.parts.items()},
    )
