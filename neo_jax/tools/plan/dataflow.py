"""Which value of a compiled program comes from which: back to where it was made, on to its uses.

Instructions that only pass a value on, to another place, dtype or device, are looked through.
"""

import collections
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from neo_jax.tools.plan.collectives import KINDS
from neo_jax.tools.plan.hlo import Instruction, Program, called_by, elements, sizes

PASSING = frozenset(
    ("bitcast", "copy", "copy-start", "copy-done", "reshape", "transpose", "convert", "opt-barrier")
)
"""What changes a value's layout or dtype, and nothing else."""

ELEMENTWISE = frozenset(
    "abs add and atan2 cbrt ceil clamp compare convert cosine divide erf exponential "
    "exponential-minus-one floor is-finite log log-plus-one logistic maximum minimum multiply "
    "negate not or popcnt power remainder round-nearest-afz round-nearest-even rsqrt select "
    "shift-left shift-right-arithmetic shift-right-logical sign sine sqrt subtract tan tanh "
    "xor".split()
)
"""What computes each element of a result from those of the operands at its place."""

_PARTS = frozenset(("slice", "dynamic-slice"))
_JOINED = '"ConcatBitcast"'  # a TPU's custom call: parts that were read one after another
_ADDED = {"dynamic-update-slice": 1, "scatter": 0}
_SUMS = frozenset(("all-reduce", "reduce-scatter"))
_MOVING = frozenset(name + end for name in KINDS for end in ("", "-start", "-done")) - frozenset(
    name + end for name in ("all-reduce", "reduce-scatter") for end in ("", "-start", "-done")
)
_STARTS = ("AsyncCollectiveStart", "AsyncCollectiveDone")  # custom calls that hand a value on
_SAME = ("get-tuple-element", "tuple", "bitcast", "copy")
_MOST = 400  # values that a search looks at


class Value(NamedTuple):
    """A result, or of a tuple an element of it."""

    computation: str
    name: str
    element: tuple[int, ...] = ()


class Source(NamedTuple):
    """Where a value was made."""

    value: Value
    instruction: Instruction
    is_argument: bool  # of the program
    passed: tuple[Instruction, ...]  # what it went through, the last first
    fixed_in: frozenset[str]  # the loops' bodies that it went into, and in which it never changes


class Flow:
    """The values of a program, and what leads from one to another."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._lines_of: dict[int, str] = {}
        self._callers: dict[str, tuple[str, Instruction]] = {}
        self._users: dict[tuple[str, str], list[Instruction]] = collections.defaultdict(list)
        self._roots = {}
        for name, lines in program.computations.items():
            for each in lines.values():
                self._lines_of[id(each)] = name
                for called in called_by(each):
                    self._callers.setdefault(called, (name, each))
                for operand in dict.fromkeys(each.operands):
                    self._users[name, operand].append(each)
                if each.is_root:
                    self._roots[name] = each

    def instruction(self, value: Value) -> Instruction:
        """Returns the instruction of a value."""
        return self.program.computations[value.computation][value.name]

    def cast_from(self, cast: Instruction) -> Instruction:
        """Returns what a cast is of."""
        return self.program.computations[self._lines_of[id(cast)]][cast.operands[0]]

    def source(self, value: Value) -> Source:
        """Returns where a value was made, or the argument that it is of."""
        passed: list[Instruction] = []
        fixed: set[str] = set()
        varies = False
        seen = set()
        while value not in seen:
            seen.add(value)
            each = self.instruction(value)
            if each.opcode in _PARTS:  # another part of it in each trip
                varies = True
            before = self._before(value, each)
            if each.opcode == "parameter" and before is not None:
                body, caller = value.computation, self._callers[value.computation][1]
                if caller.opcode == "while":
                    last = self._root_element(body, value.element)
                    if not varies and self._is_same(last, value):
                        fixed.add(body)
                    elif not self._is_same(last, value):  # made in the trip before
                        before, varies = last, True
            if before is None:
                is_argument = self._is_argument(value)
                return Source(value, each, is_argument, tuple(passed), frozenset(fixed))
            passed.append(each)
            value = before
        return Source(value, self.instruction(value), False, tuple(passed), frozenset(fixed))

    def _is_argument(self, value: Value) -> bool:
        at_start = value.computation == self.program.entry
        return at_start and self.instruction(value).opcode == "parameter"

    def _is_same(self, value: Value, parameter: Value) -> bool:
        """Whether a value is the parameter's element itself."""
        while value != parameter:
            each = self.instruction(value)
            before = self._before(value, each)
            if before is None or each.opcode not in _SAME:
                return False
            value = before
        return True

    def _root_element(self, computation: str, index: tuple[int, ...]) -> Value:
        return Value(computation, self._roots[computation].name, index)

    def _before(self, value: Value, each: Instruction) -> Value | None:
        """Returns the value that an instruction passes on, or None where it makes one."""
        computation, _, index = value
        opcode = each.opcode
        if opcode == "get-tuple-element":
            number = int(each.attribute(r"\bindex=(\d+)"))
            return Value(computation, each.operands[0], (number, *index))
        if opcode == "tuple":
            return Value(computation, each.operands[index[0]], index[1:]) if index else None
        if opcode == "opt-barrier":
            return Value(computation, each.operands[0], index)
        if opcode in ("async-done", "async-update"):
            return Value(computation, each.operands[0])
        if opcode in ("fusion", "call", "async-start"):
            return self._root_element(called_by(each)[0], index)
        if opcode == "while":
            return self._root_element(each.called("body"), index)
        if opcode == "parameter":
            return self._given(value, int(each.operands[0]))
        if opcode == "custom-call" and _JOINED in each.attributes:
            return Value(computation, each.operands[0])
        starts = opcode == "custom-call" and any(name in each.attributes for name in _STARTS)
        if starts:
            moved = next(name for name in each.operands if self._moves(computation, name))
            return Value(computation, moved)
        if opcode in PASSING | _PARTS | _MOVING:
            several = opcode in _MOVING and len(each.operands) > 1 and index
            return Value(computation, each.operands[index[-1] if several else 0])
        return None

    def _moves(self, computation: str, name: str) -> bool:
        each = self.program.computations[computation].get(name)
        return each is not None and each.opcode in _MOVING

    def _given(self, value: Value, number: int) -> Value | None:
        """Returns what a parameter of a computation is given by its caller."""
        if value.computation == self.program.entry or value.computation not in self._callers:
            return None
        computation, caller = self._callers[value.computation]
        if caller.opcode == "conditional":
            number = 1 + called_by(caller).index(value.computation)
        if number >= len(caller.operands):
            return None
        return Value(computation, caller.operands[number], value.element)

    def uses(self, value: Value) -> list[tuple[Value, Instruction, tuple[Instruction, ...]]]:
        """Returns what uses a value: where, which instruction, and what the value went through.

        What takes a value out of the program is no use.
        """
        found = []
        queue: collections.deque[tuple[Value, tuple[Instruction, ...]]] = collections.deque(
            [(value, ())]
        )
        seen = {value}
        while queue and len(seen) < _MOST:
            current, passed = queue.popleft()
            for after, user in self._after(current):
                if after is None:
                    found.append((current, user, passed))
                elif after not in seen:
                    seen.add(after)
                    queue.append((after, (*passed, user)))
        return found

    def _after(self, value: Value) -> list[tuple[Value | None, Instruction]]:
        """Returns the values that are this one passed on, each with by what; None where used."""
        computation, name, index = value
        found: list[tuple[Value | None, Instruction]] = []
        for user in self._users[computation, name]:
            opcode = user.opcode
            if opcode == "get-tuple-element":
                number = int(user.attribute(r"\bindex=(\d+)"))
                if not index or index[0] == number:
                    found.append((Value(computation, user.name, index[1:]), user))
            elif opcode == "tuple":
                places = [i for i, operand in enumerate(user.operands) if operand == name]
                found += [(Value(computation, user.name, (i, *index)), user) for i in places]
            elif opcode in ("fusion", "call", "while", "conditional", "async-start"):
                found += self._into(user, name, index)
            elif opcode in PASSING | _MOVING or opcode.endswith("-done"):
                found.append((Value(computation, user.name), user))
            else:
                found.append((None, user))
        root = self._roots.get(computation)
        if root and root.name == name and computation in self._callers:
            outside, caller = self._callers[computation]
            if caller.opcode == "while":
                if computation == caller.called("body"):
                    found.append((Value(outside, caller.name, index), caller))
                    found += self._into(caller, caller.operands[0], index)
            elif caller.opcode in ("fusion", "call", "conditional", "async-start"):
                found.append((Value(outside, caller.name, index), caller))
        return found

    def _into(
        self, user: Instruction, name: str, index: tuple[int, ...]
    ) -> list[tuple[Value | None, Instruction]]:
        """Returns a value as the computations see it that an instruction gives it to."""
        found: list[tuple[Value | None, Instruction]] = []
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        for number, called in enumerate(called_by(user)):
            for each in self.program.computations[called].values():
                if each.opcode != "parameter":
                    continue
                given = int(each.operands[0])
                if user.opcode == "conditional":
                    given = number + 1
                if given in places:
                    found.append((Value(called, each.name, index), user))
        return found

    def updated(self, value: Value) -> Instruction | None:
        """Returns the argument that a value changes: what both make together is a result.

        They meet element by element. Of a gradient that is the parameter; of several the one with
        the shortest name.
        """
        found: list[Instruction] = []
        for after, user in self._elementwise(value):
            size = _count(user.shape)
            for operand in user.operands:
                source = self.source(Value(after.computation, operand))
                whole = _count(source.instruction.shape) if source.is_argument else 0
                cut = any(
                    each.opcode in _PARTS or _JOINED in each.attributes for each in source.passed
                )
                same = whole == size or (cut and whole % size == 0)
                if whole > 1 and same and self._is_result(after):
                    found.append(source.instruction)
        return min(found, key=lambda each: len(each.attributes), default=None)

    def is_added(self, value: Value) -> bool:
        """Whether a value is added, in each trip of a loop, to what earlier trips added up."""
        for after, user in itertools.islice(self._elementwise(value), 8):
            if user.opcode == "add":
                for operand in user.operands:
                    if self.source(Value(after.computation, operand)).value == after:
                        return True
        return False

    def _elementwise(self, value: Value) -> Iterator[tuple[Value, Instruction]]:
        """Yields what is made of a value element by element, the nearest first."""
        queue, seen = collections.deque([value]), {value}
        while queue and len(seen) < _MOST:
            for where, user, _ in self.uses(queue.popleft()):
                place = _ADDED.get(user.opcode)  # of what is written into, or added to, another
                added = place is not None and user.operands[place] == where.name
                joined = user.opcode == "concatenate" or _JOINED in user.attributes
                if not (added or joined) and user.opcode not in ELEMENTWISE | _PARTS | _SUMS:
                    continue
                several = user.opcode in _SUMS and len(user.operands) > 1
                index = (user.operands.index(where.name),) if several else ()
                after = Value(where.computation, user.name, index)
                if after not in seen and _count(self.element_shape(after)) > 1:
                    seen.add(after)
                    queue.append(after)
                    if user.opcode in ELEMENTWISE:
                        yield after, user

    def _is_result(self, value: Value) -> bool:
        """Whether a value, or what is made of it element by element, is a result of the program."""
        size = _count(self.element_shape(value))
        for each in (value, *(after for after, _ in self._elementwise(value))):
            if _count(self.element_shape(each)) >= size and self._ends(each):
                return True
        return False

    def _ends(self, value: Value) -> bool:
        queue, seen = collections.deque([value]), {value}
        while queue and len(seen) < _MOST:
            current = queue.popleft()
            if current.computation == self.program.entry and self.instruction(current).is_root:
                return True
            for after, _ in self._after(current):
                if after is not None and after not in seen:
                    seen.add(after)
                    queue.append(after)
        return False

    def elements_of(self, value: Value) -> list[Instruction]:
        """Returns the instructions that take an element out of a tuple."""
        users = self._users[value.computation, value.name]
        taking = [each for each in users if each.opcode == "get-tuple-element"]
        return [
            each for each in taking if int(each.attribute(r"\bindex=(\d+)")) == value.element[0]
        ]

    def element_shape(self, value: Value) -> str:
        """Returns the shape of a value."""
        shape = self.instruction(value).shape
        for number in value.element:
            shape = elements(shape)[number].strip()
        return shape


def _count(shape: str) -> int:
    return math.prod(sizes(elements(shape)[0]))


def dtype(instruction: Instruction) -> str:
    """Returns the dtype of a result, as in "bf16"; of a tuple that of its first element."""
    found = re.search(r"([a-z]+[0-9]*\w*)\[", instruction.shape)
    return found[1] if found else ""
