"""Programs compiled for a topology, and what the compiler says of them; kept on disk.

To compile takes a minute or more, and plans are made again and again: of a mesh that was tried, of
a server's rows, by a search. What is kept is known by a hash of the program as it was lowered and
of all that else decides what comes out.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from neo_jax.devices.compilation_cache import kept_plans
from neo_jax.errors import NeoError
from neo_jax.files.paths import write_whole
from neo_jax.tools.plan.topology import Topology


class Compilation(NamedTuple):
    """A compiled program; of one that the compiler refuses only why. Bytes are of a device."""

    text: str  # XLA's, after all that the compiler does
    arguments: int
    temporaries: int
    new_outputs: int  # those that take no argument's place
    code: int
    refusal: str  # in the compiler's words, where the devices have too little memory
    seconds: float  # that it took to compile, when it was compiled

    @property
    def total(self) -> int:
        """The most bytes at a time."""
        return self.arguments + self.temporaries + self.new_outputs + self.code


def compile_for(lowered: jax.stages.Lowered, topology: Topology) -> Compilation:
    """Compiles a program for the devices of a topology, or finds what came out of it before.

    The text of a TPU's program is what its compiler writes on the way: `as_text` fails on programs
    that TPUs run in part on their SparseCores.

    Raises:
      NeoError: the compiler fails, for another reason than too little memory.
    """
    if topology.is_here:
        start = time.perf_counter()
        compiled = lowered.compile()
        return _read(compiled, compiled.as_text() or "", time.perf_counter() - start)
    folder = kept_plans()
    kept = folder / f"{_key(lowered, topology)}.json.gz" if folder else None
    if kept:
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # none, or not whole
            return Compilation(**json.loads(gzip.decompress(kept.read_bytes())))
    found = _compile(lowered)
    if kept:
        with contextlib.suppress(OSError):  # the disk may be full
            write_whole(kept, gzip.compress(json.dumps(found._asdict()).encode()))
    return found


def _compile(lowered: jax.stages.Lowered) -> Compilation:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                reason = str(error).splitlines()[0].rstrip(".")
                raise NeoError(f"the compiler fails ({reason}); choose another --kernel.") from None
            return Compilation("", 0, 0, 0, 0, str(error), time.perf_counter() - start)
        (written,) = Path(folder).glob("**/*.after_optimizations.txt")
        return _read(compiled, written.read_text(), time.perf_counter() - start)


def _read(compiled: jax.stages.Compiled, text: str, seconds: float) -> Compilation:
    stats: Any = compiled.memory_analysis()
    new = stats.output_size_in_bytes - stats.alias_size_in_bytes
    code = stats.generated_code_size_in_bytes
    arguments, temporaries = stats.argument_size_in_bytes, stats.temp_size_in_bytes
    return Compilation(text, arguments, temporaries, new, code, "", seconds)


def _key(lowered: jax.stages.Lowered, topology: Topology) -> str:
    """Returns what differs where the compiler may answer otherwise.

    The text of a program says neither from which lines of ours it came, which plans tell, nor in
    which order a mesh takes the devices of a torus: both are as the source has them.
    """
    versions = [jax.__version__, importlib.metadata.version("libtpu")]
    flags = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    flags.append(str(jax.config.values["jax_disable_most_optimizations"]))
    decided = [*versions, *flags, topology.name, _sources(), lowered.as_text()]
    return hashlib.sha256("\0".join(decided).encode()).hexdigest()


@functools.cache
def _sources() -> str:
    """Returns a hash of the source of all that programs come from."""
    package = Path(__file__).parents[2]
    files = sorted(path for pattern in _SOURCES for path in package.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


_ROOMS = ("devices", "sharding", "ops", "model", "transforms", "decode", "training")
_SOURCES = tuple(f"{room}/**/*.py" for room in _ROOMS)
