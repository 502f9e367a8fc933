"""What a compiled program computes and what it moves through memory, on one device."""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from neo_jax.config import ModelConfig
from neo_jax.tools.plan.flops import compiled_flops
from neo_jax.tools.plan.hlo import Instruction, Program, Run, elements, num_bytes, runs
from neo_jax.tools.plan.kernels import extras

Lines = Mapping[str, Instruction]  # a computation: its instructions by name


class Work(NamedTuple):
    """What one run of a program, or of an instruction, takes of a device."""

    flops: float  # of products of matrices; others are few
    memory_bytes: float  # that go through its memory
    hidden_flops: float = 0.0  # of attention's kernels, with keys that are not seen
    vector_ops: float = 0.0  # of these kernels; those of others are done while memory is read

    def __add__(self, other: object) -> "Work":
        """Returns the sums."""
        assert isinstance(other, Work)
        return Work(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def work(
    program: Program, config: ModelConfig | None = None, open_trips: int | None = None
) -> Work:
    """Returns the sum of what `works` yields, loops as often as they run."""
    total = Work(0.0, 0.0)
    for run, each in works(program, config, open_trips):
        total += Work(*(run.known_times * part for part in each))
    return total


def works(
    program: Program,
    config: ModelConfig | None = None,
    open_trips: int | None = None,
    largest: int = 0,
) -> Iterator[tuple[Run, Work]]:
    """Yields the instructions that a device runs one after another, and what each takes once.

    An instruction reads its operands and writes its result, apart from what a TPU holds in its
    vector memory; of an operand that is only sliced the slices count, of a result that is only
    updated the update. A fusion is one instruction, with the products of those in it.

    Without the config of the model whose attention they compute, kernels count as nothing. Of
    `open_trips` see `runs`; there is a `ValueError` where that is needed and None. `largest` is the
    side of the blocks of attention, 0 what is usual.
    """
    last: tuple[Run, Work] | None = None
    for run in runs(program, open_trips):
        lines = program.computations[run.computation]
        flops = compiled_flops(run.instruction, lines, config)
        if run.fusions and last:
            before = last[1]
            last = last[0], before._replace(flops=before.flops + flops)
            continue
        if last:
            yield last
        more = extras(run.instruction, lines, config, largest)
        moved = _traffic(program, run) + more.memory_bytes
        last = run, Work(flops, moved, more.hidden_flops, more.vector_ops)
    if last:
        yield last


# Instructions that move nothing by themselves: names for what is there, and ends of what began.
_STILL = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "copy-done",
    "slice-done", "async-done", "all-gather-done", "all-reduce-done", "collective-permute-done",
)  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather", "slice-start")


def _traffic(program: Program, run: Run) -> float:
    each, lines = run.instruction, program.computations[run.computation]
    if each.opcode in _STILL:
        return 0
    if each.opcode in _SLICES:
        part = elements(each.shape)[-2 if each.opcode == "slice-start" else 0]
        return num_bytes(part) + _in_memory(part)
    if each.opcode == "dynamic-update-slice":
        return 2 * _in_memory(lines[each.operands[1]].shape)
    if each.opcode == "copy-start":
        target, source = elements(each.shape)[:2]
        return _in_memory(target) + _in_memory(source)
    operands = [lines[name].shape for name in each.operands]
    if each.opcode == "async-start":
        return _started_traffic(program, each, operands)
    if each.opcode == "fusion":
        return _fusion_traffic(program, each.called("calls"), each, operands)
    return _in_memory(each.shape) + sum(map(_in_memory, operands))


def _started_traffic(program: Program, start: Instruction, operands: list[str]) -> float:
    """Counts what runs next to other work as a fusion, whose result is behind its operands.

    What a SparseCore does names neither; the computation does.
    """
    inside = start.called("calls")
    result = elements(start.shape)[1]
    if not operands:
        lines = program.computations[inside].values()
        given = {int(each.operands[0]): each.shape for each in lines if each.opcode == "parameter"}
        operands = [given[number] for number in sorted(given)]
        result = next(each.shape for each in lines if each.is_root)
    return _fusion_traffic(program, inside, start._replace(shape=result), operands)


def _fusion_traffic(
    program: Program, inside: str, fusion: Instruction, operands: list[str]
) -> float:
    """Counts what a fusion reads of its operands, and the result but for what is only updated."""
    total, updated = 0.0, 0.0
    for line in program.computations[inside].values():
        if line.opcode != "parameter":
            continue
        shape = operands[int(line.operands[0])]
        uses = _uses(program, inside, line)
        if not _in_memory(shape):
            continue
        if all(use.opcode in _SLICES for use, _ in uses):
            total += min(sum(num_bytes(use.shape) for use, _ in uses), num_bytes(shape))
        elif all(use.opcode == "dynamic-update-slice" for use, _ in uses):
            total += sum(num_bytes(lines[use.operands[1]].shape) for use, lines in uses)
            updated += num_bytes(shape)
        else:
            total += _in_memory(shape)
    return total + max(_in_memory(fusion.shape) - updated, 0)


def _uses(program: Program, computation: str, line: Instruction) -> list[tuple[Instruction, Lines]]:
    """Returns what uses a result, and where, looking through bitcasts and into fusions."""
    lines = program.computations[computation]
    found: list[tuple[Instruction, Lines]] = []
    for user in lines.values():
        if line.name not in user.operands:
            continue
        if user.opcode == "bitcast" and not user.is_root:
            found += _uses(program, computation, user)
        elif user.opcode == "fusion":
            inside = user.called("calls")
            number = str(user.operands.index(line.name))
            parameters = program.computations[inside].values()
            here = next(p for p in parameters if (p.opcode, *p.operands) == ("parameter", number))
            for use, where in _uses(program, inside, here):
                passed_on = use.opcode == "bitcast" and not user.is_root
                found += _uses(program, computation, user) if passed_on else [(use, where)]
        else:
            found.append((user, lines))
    return found


def _in_memory(shape: str) -> int:
    """Returns the bytes of those arrays of a shape that are not in vector or scalar memory."""
    arrays = re.findall(r"\w+\[[\d,<=]*\](?:\{[^}]*\})?", shape)
    return sum(num_bytes(array) for array in arrays if not re.search(r"S\([1-9]\)", array))
