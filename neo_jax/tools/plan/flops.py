"""The products of a step as it was traced, before it is split over devices, and as compiled.

A kernel's are in neither, and follow by arithmetic.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import Literal

from neo_jax.config import ModelConfig
from neo_jax.model.flops import visible_keys
from neo_jax.tools.plan.hlo import Instruction, elements, sizes

Shape = tuple[int, ...]

SPLASH = r"splash_\w*?_(fwd|dq|dkv)"
"""The kernels of attention, by the names of their calls."""


def traced_flops(traced: Any, config: ModelConfig) -> float:
    """Returns the FLOPs of all products of a `jax.stages.Traced`, on all devices together.

    A loop whose length depends on data counts once, of a condition's branches the largest. What
    nothing needs does not count, as the gradient of a frozen parameter.
    """
    jaxpr = traced.jaxpr.jaxpr
    return _flops(config, jaxpr, [True] * len(jaxpr.outvars))


def compiled_flops(
    each: Instruction, lines: Mapping[str, Instruction], config: ModelConfig | None
) -> float:
    """Returns the FLOPs of one instruction of a compiled program, on a device.

    Other than products and kernels have none. `lines` are those of its computation, `config` that
    of the model whose attention kernels compute; None where there are none.
    """
    if each.opcode not in ("dot", "convolution", "custom-call"):
        return 0
    inputs = [lines[name].shape for name in each.operands]
    operands = tuple(sizes(shape) for shape in inputs if not shape.startswith("("))
    if each.opcode == "dot":
        summed = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", each.attributes)
        axes = map(int, summed[1].split(",")) if summed else ()
        return _product_flops(sizes(each.shape), operands[0], axes)
    if each.opcode == "convolution":
        return _convolution_flops(each, operands)
    results = [sizes(shape) for shape in elements(each.shape)]
    return _attention_flops(config, each.name, operands, results) if config else 0


def _product_flops(result: Shape, left: Shape, summed: Iterable[int]) -> float:
    return 2 * math.prod(result) * math.prod(left[axis] for axis in summed)


def _convolution_flops(call: Instruction, operands: tuple[Shape, ...]) -> float:
    """Counts multiplications and additions, those with padding and between dilations left out.

    A TPU's compiler writes every product of matrices as a convolution, one with batch axes as one
    whose window slides along them, and of whose entries few meet.
    """
    labels = re.split("_|->", call.attribute(r"dim_labels=([\w>-]+)"))
    left, right, result = (
        dict(zip(axes, shape, strict=True))
        for axes, shape in zip(labels, (*operands, sizes(call.shape)), strict=True)
    )
    spatial = sorted(axis for axis in left if axis.isdigit())
    window = re.search(r"window=\{([^}]*)\}", call.attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}
    groups = re.search(r"batch_group_count=(\d+)", call.attributes)
    meetings = 1
    for number, axis in enumerate(spatial):
        stride, low, left_step, right_step = (
            int(fields[name].split("x")[number].split("_")[0]) if name in fields else default
            for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
        )
        at = np.arange(result[axis])[:, None] * stride + np.arange(right[axis]) * right_step - low
        inside = (at >= 0) & (at <= (left[axis] - 1) * left_step) & (at % left_step == 0)
        meetings *= int(inside.sum())
    batch = left["b"] // (int(groups[1]) if groups else 1)
    return 2 * batch * result["f"] * right["i"] * meetings


def _attention_flops(
    config: ModelConfig, name: str, operands: Sequence[Shape], results: Sequence[Shape]
) -> float:
    """Returns the FLOPs of attention over the keys that are seen, on average over the layers.

    Forward are two products, q k^T and the weights with v; backward the first again, the one with
    v of the output's gradient, and one for each gradient that a kernel forms (Dao, "FlashAttention
    2", 2023, algorithms 1 and 2).
    """
    kind = re.match(SPLASH, name)
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


def _flops(config: ModelConfig, jaxpr: Any, needed: Sequence[bool]) -> float:
    """Counts what leads to those results of a jaxpr that are needed."""
    total = 0.0
    used = _variables(itertools.compress(jaxpr.outvars, needed))
    for eqn in reversed(jaxpr.eqns):
        results = [var in used for var in eqn.outvars]
        if any(results) or eqn.effects:
            used |= _variables(eqn.invars)
            total += _flops_of(config, eqn, results)
    return total


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _flops_of(config: ModelConfig, eqn: Any, needed: Sequence[bool]) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        return _product_flops(eqn.outvars[0].aval.shape, eqn.invars[0].aval.shape, summed)
    if name == "pallas_call":
        operands, results = ([var.aval.shape for var in side] for side in (eqn.invars, eqn.outvars))
        return _attention_flops(config, str(params["name"]), operands, results)
    if params.get("name") == "single":  # `ops.attention.single`: sums that are products
        return 4.0 * max(math.prod(var.aval.shape) for var in eqn.invars)  # of all keys, or values
    if name == "cond":
        return max(_flops(config, branch.jaxpr, needed) for branch in params["branches"])
    total = 0.0
    for inner in _inner(params):
        if name == "scan":  # what one trip gives the next is needed; others are stacked by trip
            needed = [
                wanted or stacked.aval.shape == one.aval.shape
                for wanted, stacked, one in zip(needed, eqn.outvars, inner.outvars, strict=True)
            ]
        same = name != "while" and len(inner.outvars) == len(needed)
        total += _flops(config, inner, needed if same else [True] * len(inner.outvars))
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
