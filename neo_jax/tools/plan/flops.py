"""The products of a step as it was traced, before it is split over devices; and those of kernels.

Products of the compiled program are counted by `tools.plan.hlo_cost`; a kernel's are neither in the
trace nor in the program, and follow by arithmetic.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from jax.extend.core import Literal

from neo_jax.config import ModelConfig
from neo_jax.tools.plan.hlo import Instruction, elements, sizes
from neo_jax.training.metrics import visible_keys

Shape = tuple[int, ...]


def traced_flops(traced: Any, config: ModelConfig) -> float:
    """Returns the FLOPs of all products of a `jax.stages.Traced`, on all devices together.

    A loop whose length depends on data counts once, of a condition's branches the largest. What
    nothing needs does not count, as the gradient of a frozen parameter.
    """
    jaxpr = traced.jaxpr.jaxpr
    needed = [True] * len(jaxpr.outvars)
    return _flops(jaxpr, needed, functools.partial(_attention_flops, config))


def splash_flops(config: ModelConfig) -> Callable[[Instruction, tuple[Shape, ...]], float]:
    """Returns the arithmetic of the splash kernel's calls in a program of this model."""

    def flops(call: Instruction, operands: tuple[Shape, ...]) -> float:
        results = [sizes(shape) for shape in elements(call.shape)]
        return _attention_flops(config, call.name, operands, results)

    return flops


def _attention_flops(
    config: ModelConfig, name: str, operands: tuple[Shape, ...], results: list[Shape]
) -> float:
    """Returns the FLOPs of attention over the keys that are seen, on average over the layers.

    Forward are two products, q k^T and the weights with v; backward the first again, the one with
    v of the output's gradient, and one for each gradient that a kernel forms (Dao, "FlashAttention
    2", 2023, algorithms 1 and 2).
    """
    kind = re.match(r"splash_\w*?_(fwd|dq|dkv)", name)
    if not kind:
        return 0.0
    queries = max(operands, key=len)
    *rows, length, head_dim = queries
    formed = sum(
        shape[-2:] == (length, head_dim) for shape in results if len(shape) >= len(queries)
    )
    products = 2 if kind[1] == "fwd" else 2 + formed
    pairs = visible_keys(config, length) / config.num_layers
    return products * 2 * math.prod(rows) * pairs * head_dim


def _flops(jaxpr: Any, needed: Sequence[bool], kernel: Callable[..., float]) -> float:
    """Counts what leads to those results of a jaxpr that are needed."""
    total = 0.0
    used = _variables(itertools.compress(jaxpr.outvars, needed))
    for eqn in reversed(jaxpr.eqns):
        results = [var in used for var in eqn.outvars]
        if any(results) or eqn.effects:
            used |= _variables(eqn.invars)
            total += _flops_of(eqn, results, kernel)
    return total


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _flops_of(eqn: Any, needed: Sequence[bool], kernel: Callable[..., float]) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        result = math.prod(eqn.outvars[0].aval.shape)
        return 2 * result * math.prod(left[axis] for axis in summed)
    if name == "pallas_call":
        operands = tuple(var.aval.shape for var in eqn.invars)
        return kernel(str(params["name"]), operands, [var.aval.shape for var in eqn.outvars])
    if name == "cond":
        return max(_flops(branch.jaxpr, needed, kernel) for branch in params["branches"])
    total = 0.0
    for inner in _inner(params):
        if name == "scan":  # what one trip gives the next is needed; others are stacked by trip
            needed = [
                wanted or stacked.aval.shape == one.aval.shape
                for wanted, stacked, one in zip(needed, eqn.outvars, inner.outvars, strict=True)
            ]
        same = name != "while" and len(inner.outvars) == len(needed)
        total += _flops(inner, needed if same else [True] * len(inner.outvars), kernel)
    times = params["length"] if name == "scan" else 1
    mesh, manual = params.get("mesh"), params.get("newly_manual_axes", ())
    shards = math.prod(mesh.shape[axis] for axis in manual) if name == "shard_map" else 1
    return times * shards * total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs that an equation runs."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
