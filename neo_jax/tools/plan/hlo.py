"""XLA's text of a program, `compiled.as_text()`: what runs in it, and how often.

A program is computations, each a list of instructions. A loop calls its body a number of times, a
fusion calls a computation once and runs it as one instruction.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str  # of the result, as in "f32[4,8]{1,0}" or "(s32[], f32[4])"
    opcode: str
    operands: tuple[str, ...]  # names; of a constant its value
    attributes: str
    is_root: bool

    def attribute(self, pattern: str) -> str:
        """Returns what the first group of a pattern matches in the attributes; it must be there."""
        found = re.search(pattern, self.attributes)
        assert found, f"{self.name} does not say {pattern}"
        return found[1]

    def called(self, role: str) -> str:
        """Returns the computation that it calls as its "body", "condition" or the like."""
        return self.attribute(rf"\b{role}=%?([\w.-]+)")


class Program(NamedTuple):
    """A program as it was read."""

    computations: dict[str, dict[str, Instruction]]  # by name, and in them by name
    entry: str  # the computation that it starts with


class Run(NamedTuple):
    """An instruction, and how often it runs."""

    instruction: Instruction
    times: int | None  # None in a loop whose end depends on data
    computation: str  # that it is in
    path: tuple[str, ...]  # the loops' bodies around it, from the entry on
    fusions: tuple[str, ...]  # the fused computations around it

    @property
    def known_times(self) -> int:
        """How often it runs; raises `ValueError` in a loop whose end depends on data."""
        if self.times is None:
            name = self.instruction.name
            raise ValueError(f"{name} is in a loop of unknown length; set open_trips")
        return self.times


def runs(program: Program, open_trips: int | None = None) -> Iterator[Run]:
    """Yields all that a program runs; every branch of a condition counts.

    `open_trips` is how often a loop runs whose end depends on data.
    """

    def inside(
        name: str, times: int | None, path: tuple[str, ...], fusions: tuple[str, ...] = ()
    ) -> Iterator[Run]:
        for each in program.computations[name].values():
            yield Run(each, times, name, path, fusions)
            if each.opcode in ("fusion", "async-start"):
                called = each.called("calls")
                yield from inside(called, times, path, (*fusions, called))
                continue
            trips = _trips(program, each, open_trips) if each.opcode == "while" else 1
            repeats = None if times is None or trips is None else times * trips
            for body in _bodies(each):
                yield from inside(body, repeats, (*path, body))

    return inside(program.entry, 1, (program.entry,))


def _bodies(each: Instruction) -> list[str]:
    """Returns the computations that an instruction runs one instruction after another."""
    listed = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
    if each.opcode == "conditional" and listed:
        return re.findall(r"[\w.-]+", listed[1])
    roles = {
        "while": ("body",),
        "call": ("to_apply",),
        "conditional": ("true_computation", "false_computation"),
    }
    return [each.called(role) for role in roles.get(each.opcode, ())]


def called_by(each: Instruction) -> list[str]:
    """Returns the computations that an instruction runs: of a loop its body and its condition."""
    if each.opcode in ("fusion", "async-start"):
        return [each.called("calls")]
    if each.opcode == "while":
        return [each.called("body"), each.called("condition")]
    return _bodies(each)


def _trips(program: Program, loop: Instruction, open_trips: int | None) -> int | None:
    """Returns how often a loop runs: as the text says, or as its condition counts from 0."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    condition = program.computations[loop.called("condition")]
    root = next(instruction for instruction in condition.values() if instruction.is_root)
    if root.opcode == "compare":
        compared = {condition[name].opcode: condition[name] for name in root.operands}
        if compared.keys() == {"get-tuple-element", "constant"}:
            return int(compared["constant"].operands[0])
    return open_trips


def parse(text: str) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line[:1].isspace():
            header = re.match(r"(ENTRY )?%?([\w.-]+) ", line)
            if header:
                lines = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif lines is not None:
            instruction = _instruction(line)
            if instruction:
                lines |= _tuple_elements(lines, instruction)
                lines[instruction.name] = instruction
    return Program(computations, entry)


def _tuple_elements(
    lines: dict[str, Instruction], instruction: Instruction
) -> dict[str, Instruction]:
    """Returns the get-tuple-elements that newer texts write as operands: %pair#0 of %pair."""
    found: dict[str, Instruction] = {}
    for name in instruction.operands:
        whole, *path = name.split("#")
        for index in path:
            shape = elements((lines | found)[whole].shape)[int(index)]
            part = f"{whole}#{index}"
            found[part] = Instruction(
                part, shape, "get-tuple-element", (whole,), f", index={index}", False
            )
            whole = part
    return found


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _closing(rest)
    operands = tuple(re.findall(r"%?([\w.#-]+)(?:,|$)", re.sub(r"/\*.*?\*/", "", rest[1:end])))
    return Instruction(head[2], shape, opcode, operands, rest[end + 1 :], bool(head[1]))


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one at the start."""
    depth = 0
    for match in re.finditer("[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def elements(shape: str) -> list[str]:
    """Returns the elements of a tuple's shape; of another shape itself."""
    if not shape.startswith("("):
        return [shape]
    found, depth, start = [], 0, 1
    for match in re.finditer(r"[\[\](){},]", shape):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] == "," and depth == 1:
            found.append(shape[start : match.start()])
            start = match.end()
    return [*found, shape[start:-1]]


def sizes(shape: str) -> tuple[int, ...]:
    """Returns the sizes of an array's axes: (4, 8) of "f32[4,8]{1,0}"."""
    inside = shape[shape.index("[") + 1 : shape.index("]")]
    return tuple(int(size.strip("<=")) for size in inside.split(",") if size)


def num_bytes(shape: str) -> int:
    """Returns the bytes of a shape's arrays, tiles and padding apart: 16 of "f32[4]{0:T(128)}"."""
    bits = 0
    for dtype, inside in re.findall(r"([a-z]+[0-9]*)\w*(\[[0-9,<=]*\])", shape):
        digits = re.sub("[a-z]", "", dtype)
        bits += (int(digits) if digits else 8 * (dtype == "pred")) * math.prod(sizes(inside))
    return -(-bits // 8)
