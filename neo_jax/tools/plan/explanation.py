"""Why devices exchange what they exchange: which tensor, by which line, and what would avoid it."""

import dataclasses
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import Mesh, NamedSharding

from neo_jax.errors import NeoError
from neo_jax.tools.plan.advice import Case, Finding, find
from neo_jax.tools.plan.collectives import Traffic, located
from neo_jax.tools.plan.dataflow import Flow, Value
from neo_jax.tools.plan.hlo import Run, elements, num_bytes, parse
from neo_jax.tools.plan.lifetimes import lifetimes
from neo_jax.tools.plan.origin import Origin, Origins
from neo_jax.tools.plan.peak import Peak, find_peak, maker
from neo_jax.tools.plan.plan import Plan, slices_of

Role = Literal["argument", "gradient", "sum", "activation"]


@dataclasses.dataclass(frozen=True)
class Moved:
    """A tensor that devices exchange."""

    kind: str  # of the collective
    axes: tuple[str, ...]  # of the mesh, along which it goes
    times: int
    wire_bytes: int  # that a device sends, all times together
    role: Role
    name: str  # "params['w1']", "gradient of params['w1']", or the operation that made it
    shape: str  # of what a device gives, as in "f32[64,256]"
    origin: Origin  # of the collective
    made: Origin  # of the tensor
    findings: tuple[Finding, ...]  # what would avoid it; empty where the strategy needs it


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a compiled program sends and holds, each with its name and line; `str` is a table."""

    mesh: Mapping[str, int]  # the axes
    moved: Sequence[Moved]  # the most bytes first
    peak: Peak
    expected: int | None = None  # bytes at the peak as the compiler says; None where it does not

    @property
    def gaps(self) -> int:
        """Bytes between arrays: what the compiler sets aside is one block, with room unused."""
        return max((self.expected or 0) - self.peak.total, 0)

    def __str__(self) -> str:
        """Returns the tables that `neo-jax plan --explain` prints."""
        from neo_jax.tools.plan.explain_report import lines

        return "\n".join(lines(self))


def explain(compiled: jax.stages.Compiled, mesh: Mesh | None = None) -> Explanation:
    """Explains a jitted function that was compiled, for devices of any kind.

    Args:
      compiled: as `jax.jit(f).lower(*arguments).compile()` returns it.
      mesh: whose axes are named; by default that of the arguments or results.

    Raises:
      NeoError: the program has no text, or the mesh has another number of devices.
    """
    text = compiled.as_text()
    if not text:
        raise NeoError("the compiled program has no text; compile it anew, not from a file.")
    shape = dict(mesh.shape) if mesh else _mesh_of(compiled)
    number = max(int(each) for each in re.findall(r"num_partitions=(\d+)", text) or ["1"])
    if not shape and number > 1:
        shape = {"devices": number}
    if math.prod(shape.values()) != number and number > 1:
        raise NeoError(
            f"the program is for {number} devices, and the mesh has {math.prod(shape.values())}."
        )
    return explain_text(text, shape, compiled.memory_analysis())


def explain_plan(plan: Plan) -> Explanation:
    """Explains the compiled step of a plan.

    Raises:
      NeoError: the compiler refused it.
    """
    if not plan.program:
        raise NeoError(
            "there is nothing to explain, since the compiler refused the step; make it smaller: "
            "another --mesh, fewer sequences, or --remat full."
        )
    mesh, memory = plan.step.mesh, plan.memory
    found = explain_text(plan.program, dict(mesh.shape), slices=slices_of(mesh))
    return dataclasses.replace(found, expected=memory.total - memory.code)


def _mesh_of(compiled: jax.stages.Compiled) -> dict[str, int]:
    for sharding in jax.tree.leaves((compiled.input_shardings, compiled.output_shardings)):
        if isinstance(sharding, NamedSharding):
            return dict(sharding.mesh.shape)
    return {}


def explain_text(
    text: str,
    mesh_shape: Mapping[str, int],
    stats: Any = None,
    slices: Mapping[str, int] = types.MappingProxyType({}),
) -> Explanation:
    """Explains a program by its text; loops whose end depends on data run once.

    `stats` is what `memory_analysis` of the program returns; of `slices` see `collectives`.
    """
    program = parse(text)
    flow, origins = Flow(program), Origins(text)
    moved = [
        row
        for run, traffic in located(program, mesh_shape, 1, slices)
        for row in _moved(run, traffic, flow, origins, mesh_shape)
    ]
    whole = {
        row.name.removeprefix("gradient of "): math.prod(mesh_shape[axis] for axis in row.axes)
        for row in moved
        if any(finding.rule in ("whole", "indivisible") for finding in row.findings)
    }
    peak = find_peak(lifetimes(program, text), flow, origins, whole)
    moved.sort(key=lambda row: -row.wire_bytes)
    return Explanation(mesh_shape, moved, peak, _expected(stats))


def _expected(stats: Any) -> int | None:
    if stats is None:
        return None
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + stats.temp_size_in_bytes + new


def _moved(
    run: Run, traffic: Traffic, flow: Flow, origins: Origins, mesh_shape: Mapping[str, int]
) -> Iterator[Moved]:
    """Yields what an instruction moves: tensors that were combined one by one."""
    each = run.instruction
    lines = flow.program.computations[run.computation]
    operands = [name for name in each.operands if name in lines]
    if each.opcode == "send":
        operands = operands[:1]
    shapes = [lines[name].shape for name in operands]
    total = sum(map(num_bytes, shapes)) or 1
    for number, (name, shape) in enumerate(zip(operands, shapes, strict=True)):
        value = Value(run.computation, name)
        result = Value(run.computation, each.name, (number,) if len(operands) > 1 else ())
        sums = traffic.kind in ("all-reduce", "reduce-scatter")
        source = maker(flow, value, packed=sums)
        wire = traffic.wire_bytes * num_bytes(shape) // total
        share = traffic._replace(wire_bytes=wire)
        origin, made = _origin(flow, origins, result), origins.of(source.instruction)
        updated = flow.updated(result) if sums else None
        role: Role = "sum" if sums else "activation"
        label = made.operation or origin.operation or source.instruction.opcode
        if source.is_argument:
            role = "argument"
        elif updated is not None:
            role, label = "gradient", f"gradient of {origins.of(updated).operation}"
        case = Case(flow, origins, run, share, value, result, source, updated, origin, mesh_shape)
        yield Moved(
            traffic.kind,
            traffic.axes,
            traffic.times,
            wire,
            role,
            label,
            _short(shape),
            origin if origin.frames else made,
            made,
            tuple(find(case)),
        )


def _short(shape: str) -> str:
    """Returns dtype and sizes of an array, or of the first of a tuple."""
    return re.sub(r"/\*.*?\*/", "", elements(shape)[0]).partition("{")[0].strip()


def _origin(flow: Flow, origins: Origins, result: Value) -> Origin:
    """Returns the origin of a collective, of one that the compiler made that of what it is for."""
    own = origins.of(flow.instruction(result))
    taking = flow.elements_of(result) if result.element else []  # several were combined
    users = [each for _, user, passed in flow.uses(result) for each in (*passed, user)]
    for each in [*taking, flow.instruction(result), *users]:
        origin = origins.of(each)
        if origin.frames:
            return origin._replace(operation=origin.operation or own.operation)
    return own
