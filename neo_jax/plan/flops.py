"""The products of a step as it was traced, before it is split over devices; and those of kernels.

Products of the compiled program are counted by `neo_jax.plan.work`; a kernel's are neither in the
trace nor in the program, and follow by arithmetic.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from neo_jax.config import ModelConfig
from neo_jax.plan.hlo import Instruction, elements, sizes
from neo_jax.training.metrics import visible_keys

Shape = tuple[int, ...]


def traced_flops(traced: Any, config: ModelConfig) -> float:
    """Returns the FLOPs of all products of a `jax.stages.Traced`, on all devices together.

    A loop whose length depends on data counts once, of a condition's branches the largest.
    """
    return _flops(traced.jaxpr.jaxpr, functools.partial(_attention_flops, config))


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


def _flops(jaxpr: Any, kernel: Callable[..., float]) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            result = math.prod(eqn.outvars[0].aval.shape)
            total += 2 * result * math.prod(left[axis] for axis in summed)
        elif name == "pallas_call":
            shapes = (
                tuple(v.aval.shape for v in eqn.invars), [v.aval.shape for v in eqn.outvars]
            )  # fmt: skip
            total += kernel(str(params["name"]), *shapes)
        elif name == "cond":
            total += max(_flops(branch.jaxpr, kernel) for branch in params["branches"])
        else:
            inside = sum(_flops(inner, kernel) for inner in _inner(params))
            times = params["length"] if name == "scan" else 1
            mesh, manual = params.get("mesh"), params.get("newly_manual_axes", ())
            shards = math.prod(mesh.shape[axis] for axis in manual) if name == "shard_map" else 1
            total += times * shards * inside
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """Yields the jaxprs that an equation runs."""
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr
