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
    seconds = {"gpt-neo-125m": 35, "gpt-neo-1.3b": 40, "gpt-neo-2.7b": 45}
    found = [
        Part("device", 25, lambda _: {"limits": None}, lambda s, *_: lambda _: steps.limits(s)),
        Part("kernels", 70, kernels.cases, kernels.start),
        Part("parity", 40, parity.cases, parity.start, memory=0.4),
    ]
    for model, limit in seconds.items():
        cases = functools.partial(steps.decodings, model=model)
        found.append(Part(f"decode {model}", limit, cases, steps.start_decoding))
    for model in sizes.training:  # apart, so that each has its own peak of memory
        cases = functools.partial(lambda _, model: {model: model}, model=model)
        found.append(Part(f"train {model}", 45, cases, steps.start_training))
    found.append(Part("prefill", 30, steps.prefills, steps.start_prefill))
    for how, limit in {"plain": 40, "compiled": 65}.items():
        cases = functools.partial(theirs.cases, how=how)
        found.append(Part(f"transformers {how}", limit, cases, theirs.start, memory=0))
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
