"""Which arrays of a compiled program are in memory at which time, by its schedule.

XLA's text lists instructions in the order in which they run. A result takes memory from where it
is made to its last use; what XLA keeps in one place, such as a loop's state, counts once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from neo_jax.tools.plan.dataflow import ELEMENTWISE
from neo_jax.tools.plan.hlo import Instruction, Program, called_by, elements, num_bytes, sizes
from neo_jax.tools.plan.in_place import (
    WRITTEN,
    element_by_element,
    given_up,
    said_in_place,
    updated_in_place,
)


@dataclasses.dataclass
class Life:
    """An array, from where it is made to its last use."""

    computation: str
    instruction: Instruction  # that makes it
    index: tuple[int, ...]  # of its result
    shape: str
    size: int  # bytes in the memory of the device
    start: int  # in instructions, those of a loop's body once
    end: int
    is_argument: bool  # of the program: there all the time
    buffer: int  # arrays of one number share a place
    reserved: bool = False  # whether its place is taken from the start on: a result's


@dataclasses.dataclass(frozen=True)
class Timeline:
    """All arrays of a program, and how much memory they take together."""

    lives: Sequence[Life]
    running: Sequence[Instruction]  # one for each time

    def curve(self, size: Callable[[Life], float] = lambda life: life.size) -> np.ndarray:
        """Returns the bytes that are taken at each time, where an array takes `size` of it."""
        last = max(len(self.running) - 1, 0)
        changes = np.zeros(last + 2)
        for lives in self._places():
            most = max(map(size, lives))
            reserved = any(life.reserved for life in lives)
            for start, end in [(0, last)] if reserved else _merged(lives):
                changes[start] += most
                changes[end + 1] -= most
        return np.cumsum(changes)[:-1]

    @property
    def peak(self) -> int:
        """The time at which most memory is taken; the first of several."""
        return int(np.argmax(self.curve()))

    def alive(self, time: int) -> list[Life]:
        """Returns the arrays of a time, one for each place, the largest first."""
        found = []
        for lives in self._places():
            here = [life for life in lives if life.start <= time <= life.end]
            here = here or [life for life in lives if life.reserved][:1]
            if here:
                most = max(life.size for life in lives)
                first = next((life for life in lives if life.is_argument), here[-1])
                found.append(dataclasses.replace(first, size=most))
        return sorted(found, key=lambda life: -life.size)

    def _places(self) -> Iterator[list[Life]]:
        lives = sorted((life for life in self.lives if life.size), key=lambda life: life.buffer)
        for _, group in itertools.groupby(lives, key=lambda life: life.buffer):
            yield list(group)


def _merged(lives: Sequence[Life]) -> Iterator[tuple[int, int]]:
    """Yields the times at which at least one array is alive, without overlaps."""
    spans = sorted((life.start, life.end) for life in lives)
    start, end = spans[0]
    for first, last in spans[1:]:
        if first > end + 1:
            yield start, end
            start, end = first, last
        end = max(end, last)
    yield start, end


def lifetimes(program: Program, text: str) -> Timeline:
    """Returns the arrays of a program, of which the text says what it gives back in place."""
    return _Schedule(program, text).timeline()


# Results that are their operand's, under another name or in another shape.
_NAMES = ("bitcast", "opt-barrier", "domain", "add-dependency")


class _Schedule:
    """Goes through a program as it runs, a loop's body once."""

    def __init__(self, program: Program, text: str) -> None:
        self.program = program
        self.running: list[Instruction] = []
        self.lives: list[Life] = []
        self._places: list[int] = []  # of each array another that shares its place, or itself
        self._shared: list[tuple[int, int]] = []  # where a result may take an operand's place
        self._given_up: set[int] = set()  # arguments whose places a result takes
        self._owned: dict[int, list[Life]] = {}  # what else is in the places of arguments
        self._settled: set[int] = set()  # operands that gave a place, and results that took one
        self._is_tpu = ":T(" in text.partition("\n")[0]
        self._donated = given_up(text.partition("\n")[0])

    @property
    def time(self) -> int:
        """Of what runs now."""
        return max(len(self.running) - 1, 0)

    def timeline(self) -> Timeline:
        """Runs the program."""
        entry = self.program.computations[self.program.entry]
        given: dict[int, list[int]] = {}
        for each in entry.values():
            if each.opcode == "parameter":
                given[int(each.operands[0])] = self._new(self.program.entry, each, True)
        results = self._visit(self.program.entry, given)
        for array in results:
            self.lives[array].end = self.time
        for array in itertools.chain(*given.values()):
            self.lives[array].reserved = True
        for output, number in self._donated:
            if number in given and output < len(results):
                self._join(given[number][0], results[output])
                self._given_up.add(given[number][0])
        self._owned = {self._place(array): [] for array in itertools.chain(*given.values())}
        for array, life in enumerate(self.lives):
            if not life.is_argument and self._place(array) in self._owned:
                self._owned[self._place(array)].append(life)
        for operand, result in self._shared:
            if self._place(result) not in self._owned:
                self._share(operand, result)
        self._reserve(results)
        for array, life in enumerate(self.lives):
            life.buffer = self._place(array)
        return Timeline(self.lives, self.running)

    def _visit(self, computation: str, given: dict[int, list[int]]) -> list[int]:
        """Runs a computation on arrays for its parameters; returns the arrays of its result."""
        known: dict[str, list[int]] = {}
        results: list[int] = []
        for each in self.program.computations[computation].values():
            known[each.name] = self._result(computation, each, known, given)
            if each.is_root:
                results = known[each.name]
        self._use(results)
        return results

    def _result(
        self,
        computation: str,
        each: Instruction,
        known: dict[str, list[int]],
        given: dict[int, list[int]],
    ) -> list[int]:
        opcode = each.opcode
        if opcode == "parameter":
            return given[int(each.operands[0])]
        if opcode == "get-tuple-element":
            number = int(each.attribute(r"\bindex=(\d+)"))
            whole = self.program.computations[computation][each.operands[0]].shape
            return _element(known[each.operands[0]], whole, number)
        operands = [known[name] for name in each.operands if name in known]
        if opcode == "tuple":
            return list(itertools.chain(*operands))
        if opcode in _NAMES:
            return operands[0]
        self.running.append(each)
        for operand in operands:
            self._use(operand)
        if opcode.endswith("-done"):
            return self._done(computation, each, known)
        if opcode == "while":
            return self._loop(computation, each, operands[0])
        if opcode == "call":
            return self._visit(called_by(each)[0], dict(enumerate(operands)))
        result = self._new(computation, each)
        if opcode == "conditional":
            for operand, branch in zip(operands[1:], called_by(each), strict=True):
                for array, end in zip(result, self._visit(branch, {0: operand}), strict=True):
                    self._join(array, end)
            self.running.append(each)
            for array in result:
                self.lives[array].start = self.lives[array].end = self.time
            return result
        return self._placed(each, operands, result)

    def _placed(self, each: Instruction, operands: list[list[int]], result: list[int]) -> list[int]:
        """Says which operands' places an instruction's results take."""
        if each.opcode in WRITTEN and len(result) == 1:
            self._join(operands[0][0], result[0])
        elif each.opcode.endswith("-start"):
            self._started(each, operands, result)
        for output, number in said_in_place(each):
            if number < len(operands) and len(operands[number]) == 1 and output < len(result):
                self._join(operands[number][0], result[output])
        if each.opcode == "fusion":
            for output, number in updated_in_place(self.program, called_by(each)[0]):
                self._join(operands[number][0], result[output])
            for number, output in element_by_element(self.program, called_by(each)[0]):
                if len(operands[number]) == 1:
                    self._shared.append((operands[number][0], result[output]))
        elif each.opcode in ELEMENTWISE or each.opcode in ("sort", "copy"):
            pairs = zip(operands, itertools.cycle(result))
            self._shared += [(arrays[0], array) for arrays, array in pairs if len(arrays) == 1]
        return result

    def _started(self, each: Instruction, operands: list[list[int]], result: list[int]) -> None:
        """A start's result holds its operands next to what will be there when it is done."""
        if each.opcode == "copy-start":
            self._join(operands[0][0], result[1])
        elif each.opcode != "all-reduce-start":
            for operand, array in zip(itertools.chain(*operands), result, strict=False):
                if self.lives[operand].size == self.lives[array].size:
                    self._join(operand, array)

    def _done(self, computation: str, each: Instruction, known: dict[str, list[int]]) -> list[int]:
        start = self.program.computations[computation][each.operands[0]]
        arrays, shapes = known[start.name], elements(start.shape)
        if each.opcode == "all-reduce-done" or len(arrays) == 1:
            return arrays
        if each.opcode == "copy-done":
            return arrays[:1]
        return _element(arrays, start.shape, 1) if len(shapes) > 1 else arrays

    def _loop(self, computation: str, loop: Instruction, state: list[int]) -> list[int]:
        body, condition = called_by(loop)
        (start,) = (
            each for each in self.program.computations[body].values() if each.opcode == "parameter"
        )
        inside = self._new(body, start)
        self._visit(condition, {0: inside})
        after = self._visit(body, {0: inside})
        self.running.append(loop)
        result = self._new(computation, loop)
        for before, phi, last, end in zip(state, inside, after, result, strict=True):
            maker = last if last != phi else before
            for array in (phi, end):  # known by what makes it
                made = self.lives[maker]
                life = self.lives[array]
                life.computation, life.instruction = made.computation, made.instruction
                life.index = made.index
            for array in (before, last, end):
                self._join(phi, array)
        return result

    def _new(self, computation: str, each: Instruction, is_argument: bool = False) -> list[int]:
        found = []
        for index, shape in _arrays(each.shape):
            size = 0 if each.opcode == "constant" else memory_bytes(shape)
            number = len(self.lives)
            time = 0 if is_argument else self.time
            self.lives.append(
                Life(computation, each, index, shape, size, time, time, is_argument, number)
            )
            self._places.append(number)
            found.append(number)
        return found

    def _use(self, arrays: Sequence[int]) -> None:
        for array in arrays:
            self.lives[array].end = max(self.lives[array].end, self.time)

    def _place(self, array: int) -> int:
        while self._places[array] != array:
            self._places[array] = self._places[self._places[array]]
            array = self._places[array]
        return array

    def _join(self, first: int, second: int) -> None:
        self._places[self._place(second)] = self._place(first)

    def _share(self, operand: int, result: int) -> None:
        """Gives a result its operand's place, if that is not used any more; once each.

        An argument's place takes what is gone when a result of the program is written there, and no
        copy of it: there would be none if it could be there.
        """
        if not self._settled.isdisjoint((operand, result)):
            return
        old, new = self.lives[operand], self.lives[result]
        is_copy = new.instruction.opcode == "copy"
        moved = is_copy and old.shape != new.shape  # to another layout
        if old.end != new.start or old.size != new.size or moved:
            return
        if operand in self._given_up:
            there = self._owned[self._place(operand)]
            if is_copy or any(each.start < new.end and new.start < each.end for each in there):
                return
            there.append(new)
            self._join(operand, result)
        elif not old.is_argument:
            old.end = max(old.start, new.start - 1)
        else:
            return
        self._settled |= {operand, result}

    def _reserve(self, results: Sequence[int]) -> None:
        """Takes the places of results from the start on.

        But on TPUs, XLA puts into the smallest of them what fits while it is free: before the
        result is there, and after the last use of the argument that was there.
        """
        places: dict[int, list[Life]] = {}
        for array, life in enumerate(self.lives):
            places.setdefault(self._place(array), []).append(life)
        own = {self._place(array) for array in results}
        taken = {
            place: _spans(places[place])
            for place in sorted(own, key=lambda place: (_size(places[place]), place))
        }
        free = places.keys() - own - self._owned.keys()
        others = sorted(free, key=lambda place: (-_size(places[place]), place))
        for other in () if self._is_tpu else others:
            size, spans = _size(places[other]), _spans(places[other])
            for place, there in taken.items():
                if 0 < size <= _size(places[place]) and _are_apart(spans, there):
                    there += spans
                    self._join(place, other)
                    break
        for life in itertools.chain(*(places[place] for place in own)):
            life.reserved = True


def _spans(lives: Sequence[Life]) -> list[tuple[int, int]]:
    return [(life.start, life.end) for life in lives]


def _are_apart(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    return all(a[1] < b[0] or b[1] < a[0] for a in some for b in others)


def _size(lives: Sequence[Life]) -> int:
    return max(life.size for life in lives)


def _arrays(shape: str) -> list[tuple[tuple[int, ...], str]]:
    """Returns the arrays of a shape, of tuples in tuples too: where they are, and their shapes."""
    if not shape.startswith("("):
        return [((), shape)]
    return [
        ((number, *index), array)
        for number, each in enumerate(elements(re.sub(r"/\*.*?\*/", "", shape)))
        if each
        for index, array in _arrays(each.strip())
    ]


def _element(arrays: list[int], shape: str, number: int) -> list[int]:
    """Returns those of a tuple's arrays that are of one of its elements."""
    counts = [len(_arrays(each.strip())) for each in elements(shape)]
    start = sum(counts[:number])
    return arrays[start : start + counts[number]]


def memory_bytes(shape: str) -> int:
    """Returns the bytes that an array takes of a device's memory, with what fills its tiles.

    What is in vector memory or on the host takes none.
    """
    layout = re.search(r"\]\{([\d,]*)(?::([^}]*))?\}", shape)
    if not layout or not layout[2]:
        return num_bytes(shape)
    space = re.search(r"S\((\d+)\)", layout[2])
    if space and space[1] != "0":
        return 0
    tile = re.match(r"T\(([\d,]+)\)", layout[2])
    if not tile or not layout[1]:
        return num_bytes(shape)
    order = [int(axis) for axis in layout[1].split(",")]
    tiles = [int(size) for size in tile[1].split(",")][::-1]
    whole = sizes(shape)
    padded = [
        -(-whole[axis] // tiles[place]) * tiles[place] if place < len(tiles) else whole[axis]
        for place, axis in enumerate(order)
    ]
    count = math.prod(whole)
    return num_bytes(shape) * math.prod(padded) // count if count else 0
