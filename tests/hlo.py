"""What a compiled TPU program moves over its main memory, read from its text."""

import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
# These name what others have moved, or will.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "partition-id"}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str  # attributes, or the number of a parameter


class Program:
    """The computations of a compiled program.

    A TPU has a large main memory and a small, fast one; arrays that lie in the latter, of memory
    space 1, are not counted.
    """

    def __init__(self, text: str, trips: int):
        """Reads what `compiled.as_text()` returns; `trips` is how often loops within loops run."""
        self.trips = trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        body: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
            if head:
                body = self.computations[head[1]] = {}
            part = re.match(r"\s+(?:ROOT )?%([\w.\-]+) = ", line)
            if part:
                kind, rest = _balanced(line[part.end() :])
                op = rest.strip().partition("(")[0]
                operands, rest = _balanced(rest.strip()[len(op) :])
                names = re.findall(r"%([\w.\-]+)", operands)
                body[part[1]] = Instruction(part[1], kind, op, names, operands + rest)

    def loops(self) -> list[str]:
        """The bodies of the loops of the main computation."""
        last = list(self.computations.values())[-1]
        return [_called(line, "body") for line in last.values() if line.op == "while"]

    def traffic(self, computation: str) -> float:
        """Bytes read from and written to main memory when a computation runs once."""
        body = self.computations[computation]
        return sum(self._moved(line, body) for line in body.values())

    def _moved(self, line: Instruction, body: dict[str, Instruction]) -> float:
        sources = [body[name] for name in line.operands if name in body]
        if line.op in FREE or line.op.endswith("-done"):
            return 0
        if line.op == "while":
            return self.trips * self.traffic(_called(line, "body"))
        if line.op == "copy-start":  # the copy, the original, and a context
            return sum(map(_in_main_memory, _arrays(line.type)[:2]))
        if line.op == "slice-start":
            return min(map(_size, _arrays(line.type)[:2]))
        if line.op == "dynamic-slice":
            return _main(line.type)
        if line.op == "dynamic-update-slice":
            return 2 * sum(map(_size, _arrays(sources[1].type))) if _main(line.type) else 0
        if line.op == "fusion":
            inner = self.computations[_called(line, "calls")]
            reads = [
                self._read(inner, number, _main(source.type))
                for number, source in enumerate(sources)
            ]
            return sum(reads) + (self._written(inner) if _main(line.type) else 0)
        return sum(_main(source.type) for source in sources) + _main(line.type)

    def _read(self, inner: dict[str, Instruction], number: int, whole: float) -> float:
        """What a fusion reads of an operand: all of it, unless it takes but slices."""
        name = next(
            line.name
            for line in inner.values()
            if line.op == "parameter" and line.rest.startswith(f"({number})")
        )
        return min(whole, self._taken(inner, name, whole)) if whole else 0

    def _taken(self, inner: dict[str, Instruction], name: str, whole: float) -> float:
        if name == list(inner)[-1]:  # handed on as it is
            return whole
        total = 0.0
        for line in inner.values():
            if name not in line.operands:
                continue
            first = line.operands[0] == name
            if line.op in ("dynamic-slice", "slice", "gather") and first:
                total += sum(map(_size, _arrays(line.type)))
            elif line.op == "bitcast":
                total += self._taken(inner, line.name, whole)
            elif line.op == "fusion":
                called = self.computations[_called(line, "calls")]
                total += self._read(called, line.operands.index(name), whole)
            elif not (line.op == "dynamic-update-slice" and first):
                return whole
        return total

    def _written(self, inner: dict[str, Instruction]) -> float:
        """What a fusion writes: its result, or what it updates of one."""
        root = list(inner.values())[-1]
        while root.op == "bitcast":
            root = inner[root.operands[0]]
        if root.op == "dynamic-update-slice":
            return sum(map(_size, _arrays(inner[root.operands[1]].type)))
        if root.op == "fusion":
            return self._written(self.computations[_called(root, "calls")])
        return _main(root.type)


def _balanced(text: str) -> tuple[str, str]:
    """Splits text after its first bracket is closed, or else after its first word."""
    if not text.startswith("("):
        word, _, rest = text.partition(" ")
        return word, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return text[: i + 1], text[i + 1 :]
    raise ValueError(f"unbalanced: {text}")


def _called(line: Instruction, attribute: str) -> str:
    return re.search(rf"{attribute}=%([\w.\-]+)", line.rest)[1]


def _arrays(kind: str) -> list[tuple[str, str, str]]:
    """Dtype, sizes and layout of each array of a type."""
    return re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", kind)


def _size(array: tuple[str, str, str]) -> float:
    return BYTES.get(array[0], 0) * math.prod(int(n) for n in array[1].split(",") if n)


def _in_main_memory(array: tuple[str, str, str]) -> float:
    return 0 if "S(" in array[2] else _size(array)


def _main(kind: str) -> float:
    return sum(map(_in_main_memory, _arrays(kind)))
