"""Where in the source an instruction of a compiled program comes from.

JAX writes into a program the operation that an instruction is of, as in
"jit(step)/transpose(jvp(mlp))/dot_general", and the lines of Python that called it. XLA's text has
the lines next to the instruction, or in tables at its start.
"""

import re
import sysconfig
from pathlib import Path
from typing import NamedTuple

from neo_jax.tools.plan.hlo import Instruction

_OWN = str(Path(__file__).parents[2])  # a library of which the user may want to know the line
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")} - {""}
)  # where others' code is


class Frame(NamedTuple):
    """A line of Python."""

    file: str
    line: int
    function: str  # that it is in; "" where the program does not say

    @property
    def is_library(self) -> bool:
        """Whether it is of an installed library, JAX, Flax and optax among them."""
        if self.file.startswith(_OWN):
            return False
        return self.file.startswith(_LIBRARIES) or "/site-packages/" in self.file

    def __str__(self) -> str:
        """Returns "model.py:12", the file in its folder below the one that is worked in."""
        path = Path(self.file)
        here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else None
        return f"{here or Path(*path.parts[-2:])}:{self.line}"


class Origin(NamedTuple):
    """What an instruction was written as."""

    operation: str  # JAX's path of names, without what only JAX needs; "" where not known
    frames: tuple[Frame, ...]  # the innermost first

    @property
    def line(self) -> Frame | None:
        """The innermost line that is not a library's, or else the innermost."""
        own = [frame for frame in self.frames if not frame.is_library]
        return next(iter(own or self.frames), None)

    @property
    def primitive(self) -> str:
        """The last name of the operation, as in "dot_general"."""
        return self.operation.rpartition("/")[2]

    @property
    def is_backward(self) -> bool:
        """Whether it is of a gradient."""
        return "transpose(" in self.operation


_METADATA = r'metadata=\{((?:[^"{}]|"(?:[^"\\]|\\.)*")*)\}'  # with braces in texts


class Origins:
    """The origins of a program's instructions, as its text has them."""

    def __init__(self, text: str) -> None:
        start = text.partition("\n%")[0].partition("\nENTRY")[0]
        self._files = dict(re.findall(r'^(\d+) "(.*)"$', _table(start, "FileNames"), re.M))
        self._functions = dict(re.findall(r'^(\d+) "(.*)"$', _table(start, "FunctionNames"), re.M))
        self._lines = {
            number: (self._files.get(file, ""), int(line), self._functions.get(function, ""))
            for number, file, function, line in re.findall(
                r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)",
                _table(start, "FileLocations"),
                re.M,
            )
        }
        frames = re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?",
            _table(start, "StackFrames"),
            re.M,
        )
        # Some versions count the parents from 1 on: there the first, which has none, says 1.
        offset = any(int(parent or 0) >= int(number) for number, _, parent in frames)
        self._frames = {
            int(number): (place, int(parent or 0) - offset) for number, place, parent in frames
        }

    def of(self, instruction: Instruction) -> Origin:
        """Returns the origin of an instruction, of which no part need be known."""
        metadata = re.search(_METADATA, instruction.attributes)
        said = metadata[1] if metadata else ""
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', said)
        operation = re.sub(r"\\(.)", r"\1", name[1]) if name else ""
        file = re.search(r'source_file="([^"]*)"', said)
        line = re.search(r"source_line=(\d+)", said)
        number = re.search(r"stack_frame_id=(\d+)", said)
        frames = [Frame(file[1], int(line[1]), "")] if file and line else []
        current = int(number[1]) if number else 0
        while current in self._frames:
            location, parent = self._frames[current]
            if location in self._lines:
                frames.append(Frame(*self._lines[location]))
            current = parent if parent < current else 0
        return Origin(_plain(operation), tuple(dict.fromkeys(frames)))


def _table(text: str, name: str) -> str:
    """Returns the lines of a table, up to the empty line after it."""
    return text.partition(f"\n{name}\n")[2].partition("\n\n")[0] + "\n"


def _plain(operation: str) -> str:
    """Returns an operation's names without those of JAX's own making: "jit(step)/while/body/"."""
    parts = re.split(r"/(?![^()]*\))", operation)
    kept = [part for part in parts[:-1] if part not in _OF_JAX and not part.startswith("jit(")]
    return "/".join([*kept, parts[-1]])


_OF_JAX = (
    "while", "body", "cond", "closed_call", "eval_jaxpr", "jvp()", "checkpoint", "pjit",
    "shard_map", "custom_jvp_call", "custom_vjp_call", "remat", "rematted_computation", "",
)  # fmt: skip
