"""The parts in order, what matters most first: each a process of its own with a limit of time."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from accelerator import kernels, parity, rows, steps, theirs
from accelerator.sizes import Sizes

HERE = "the process ended here"
"""The error of a row that is being measured, until it has been."""


class Part(NamedTuple):
    """Rows that are measured by one process."""

    name: str
    seconds: int
    cases: Callable[[Sizes], dict[str, Any]]  # by the names of rows
    start: Callable[[Sizes, Sequence[Any], int], Callable[[Any], rows.Row]]
    memory: float = 0.92  # of the device, that JAX takes at once; 0 where it takes none


def parts(sizes: Sizes) -> dict[str, Part]:
    """Returns all parts by name, in their order: 8 minutes in all."""

    def models(sizes: Sizes) -> dict[str, str]:
        return {name: name for name in sizes.training}

    def model(name: str) -> Callable[[Sizes], dict[str, Any]]:
        return lambda _: {name: name}

    def decoding(name: str) -> Callable[[Sizes], dict[str, Any]]:
        return functools.partial(steps.decodings, model=name)

    decode = {"gpt-neo-125m": 35, "gpt-neo-2.7b": 50}  # whose programs take longer to compile
    found = [
        Part("device", 40, lambda _: {"limits": None}, lambda s, *_: lambda _: steps.limits(s)),
        Part("kernels", 95, kernels.cases, kernels.start),
        Part("parity", 45, lambda sizes: dict(sizes.parity), parity.start, memory=0.4),
        *(
            Part(f"decode {m}", decode.get(m, 45), decoding(m), steps.start_decoding)
            for m in sizes.models
        ),
        # Apart, so that each has its own peak of memory.
        *(Part(f"train {m}", 25, model(m), steps.start_training) for m in sizes.training),
        Part("prefill", 25, models, steps.start_prefill),
        *(
            Part(f"transformers {how}", limit, functools.partial(theirs.cases, how=how),
                 theirs.start, memory=0)
            for how, limit in {"plain": 45, "compiled": 50}.items()
        ),
    ]  # fmt: skip
    return {part.name: part for part in found}


def missing(part: Part, sizes: Sizes, path: Path, call: int) -> dict[str, Any]:
    """Returns the cases without a result, but for those that failed in this very call."""
    known = rows.read(path)

    def is_done(name: str) -> bool:
        row = known.get((part.name, name), {"error": "", "call": -1})
        return "error" not in row or row["call"] == call

    return {name: case for name, case in part.cases(sizes).items() if not is_done(name)}


def measure(part: Part, sizes: Sizes, path: Path, call: int, at_once: int) -> None:
    """Measures what is missing of a part, and adds each row as soon as it is known.

    Args:
      part: the part.
      sizes: of everything.
      path: of the file of results.
      call: the number of this call of the script, which every row holds.
      at_once: threads that compile.

    Raises:
      SystemExit: the file holds figures of another device.
    """
    if part.memory:
        _check_device(path)
    wanted = missing(part, sizes, path, call)
    run = part.start(sizes, list(wanted.values()), at_once)
    for name, case in wanted.items():
        rows.append(path, (part.name, name), {"error": HERE, "call": call})
        try:
            row = run(case)
        except Exception as error:  # whatever it is, the next row may do
            row = {"error": rows.explain(error)}
        rows.append(path, (part.name, name), row | {"call": call})


def _check_device(path: Path) -> None:
    before = rows.read(path).get(("device", "limits"), {}).get("device")
    here = jax.local_devices()[0].device_kind
    if before not in (None, here):
        raise SystemExit(f"{path} holds figures of a {before}, and this is a {here}: name another.")
