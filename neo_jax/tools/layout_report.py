"""How a strategy lays a model out: a table of every array, and drawings of how they are split."""

import collections
import dataclasses
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from neo_jax import axes
from neo_jax.config import ModelConfig
from neo_jax.devices.memory import bytes_text
from neo_jax.model import cache, transformer
from neo_jax.model.tensor_table import tensors
from neo_jax.sharding.rules import Sharding

T = TypeVar("T")

_SHOWN = 8  # parts of an axis, and devices in a part, that a drawing shows


@dataclasses.dataclass(frozen=True)
class Part:
    """Arrays of one name and shape, one a layer."""

    name: str  # of a parameter, h_* standing for every layer; or of a cache leaf
    count: int
    axes: list[str]
    shape: list[int]
    split: list[list[str]]  # the mesh axes that split each axis
    bytes_per_device: int  # of all these arrays


def _part(
    sharding: Sharding,
    name: str,
    axes: Sequence[str],
    shape: Sequence[int],
    count: int = 1,
    itemsize: int = 4,
    constraint: Sequence[str | None] = (),
) -> Part:
    """Returns a part that is split by its axes, or by those of a constraint."""
    named = constraint or axes
    sharding.spec(named, tuple(shape), name.replace("*", "0"))
    split = [list(sharding.mesh_axes(axis)) if axis else [] for axis in named]
    shards = math.prod(sharding.mesh.shape[name] for names in split for name in names)
    size = itemsize * (count * math.prod(shape) // shards)
    return Part(name, count, list(axes), list(shape), split, size)


def parameters(config: ModelConfig, sharding: Sharding) -> list[Part]:
    """Returns what a device holds of the parameters, float32; optimizer slots have their layout.

    Raises:
      NeoError: the strategy cannot split this model; see `Sharding.spec`.
    """
    found = collections.Counter(
        (re.sub(r"^h_\d+", "h_*", "/".join(tensor.path)), tensor.axes, tensor.shape)
        for tensor in tensors(config)
    )
    return [_part(sharding, *tensor, count) for tensor, count in found.items()]


def cache_leaves(config: ModelConfig, sharding: Sharding) -> list[Part]:
    """Returns what a device holds of a bfloat16 cache for whole contexts, a row a batch shard."""
    parts = []
    for kind, count in collections.Counter(config.layer_types).items():
        slots = cache.num_slots(config, config.layer_types.index(kind), config.max_length)
        sizes = _sizes(config, sharding) | {axes.KV_LENGTH: slots}
        for leaf, names in cache.LOGICAL_AXES.items():
            shape, itemsize = [sizes[axis] for axis in names], 4 if leaf == "positions" else 2
            parts.append(_part(sharding, f"{kind} cache/{leaf}", names, shape, count, itemsize))
    return parts


def activations(config: ModelConfig, sharding: Sharding) -> list[Part]:
    """Returns what a device holds of the activations of one block and of the head, float32.

    For whole contexts, one row for every batch shard. What the compiler places counts as whole.
    """
    sizes = _sizes(config, sharding)
    rows = (axes.BATCH, axes.LENGTH)
    parts = []
    for name, constraint, logical in (
        ("residual stream", transformer.RESIDUAL_STREAM, (*rows, axes.EMBED)),
        ("queries", transformer.QUERIES, (axes.BATCH, axes.HEADS, axes.LENGTH, axes.HEAD_DIM)),
        ("MLP hidden", transformer.MLP_HIDDEN, (*rows, axes.MLP)),
        ("logits", transformer.LOGITS, (*rows, axes.VOCAB)),
    ):
        named = [axis if isinstance(axis, str) else None for axis in constraint]
        shape = [sizes[axis] for axis in logical]
        parts.append(_part(sharding, name, logical, shape, constraint=named))
    return parts


def _sizes(config: ModelConfig, sharding: Sharding) -> dict[str, int]:
    return {
        axes.BATCH: sharding.num_shards(axes.BATCH),
        axes.LENGTH: config.max_length,
        axes.EMBED: config.embed_dim,
        axes.HEADS: config.num_heads,
        axes.HEAD_DIM: config.head_dim,
        axes.MLP: config.mlp_dim,
        axes.VOCAB: config.padded_vocab_size,
    }


def describe(config: ModelConfig, sharding: Sharding) -> dict[str, Any]:
    """Returns a strategy's mesh, rules and arrays, sizes in bytes a device, for JSON."""
    weights, leaves = parameters(config, sharding), cache_leaves(config, sharding)
    of_weights = sum(part.bytes_per_device for part in weights)
    return {
        "mesh": dict(sharding.mesh.shape),
        "rules": {axis: list(names) for axis, names in sharding.rules},
        "parameters": list(map(dataclasses.asdict, weights)),
        "activations": list(map(dataclasses.asdict, activations(config, sharding))),
        "cache": list(map(dataclasses.asdict, leaves)),
        "bytes_per_device": {
            "parameters_float32": of_weights,
            "optimizer_adamw_float32": 2 * of_weights,
            "parameters_bfloat16": of_weights // 2,
            "cache_bfloat16": sum(part.bytes_per_device for part in leaves),
        },
    }


def lines(config: ModelConfig, sharding: Sharding) -> Iterator[str]:
    """Yields the table and the drawings, line by line."""
    fields = describe(config, sharding)
    weights, leaves = parameters(config, sharding), cache_leaves(config, sharding)
    yield "mesh   " + ", ".join(f"{name}={size}" for name, size in fields["mesh"].items())
    yield "rules  " + ", ".join(f"{axis}:{'+'.join(n)}" for axis, n in fields["rules"].items())
    yield ""
    rows = [("array", "axes, and what splits them", "a device")]
    rows += map(_row, [*weights, *activations(config, sharding), *leaves])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, cut, size in rows:
        yield f"{name:<{widths[0]}}  {cut:<{widths[1]}}  {size:>{widths[2]}}"
    yield ""
    yield "AdamW keeps two arrays for each parameter, which are laid out as it is."
    for name, size in fields["bytes_per_device"].items():
        yield f"{name.replace('_', ' '):<{widths[0]}}  {bytes_text(size, 1)} a device"
    by_cut: dict[tuple, list[str]] = {}
    for part in weights + leaves:
        split = zip(part.axes, map(tuple, part.split), strict=True)
        cuts = tuple((axis, names) for axis, names in split if names)
        by_cut.setdefault(cuts, []).append(part.name)
    for cuts, names in by_cut.items():
        yield ""
        yield from textwrap.wrap(", ".join(names), 100)
        yield from draw(cuts, sharding) if cuts else ["  whole on every device"]


def _row(part: Part) -> tuple[str, str, str]:
    cut = " x ".join(
        f"{axis} {size}" + (f"/{'+'.join(names)}" if names else "")
        for axis, size, names in zip(part.axes, part.shape, part.split, strict=True)
    )
    times = f"{part.count} x " if part.count > 1 else ""
    return part.name, f"{times}{cut}", bytes_text(part.bytes_per_device, 1)


def draw(cuts: Sequence[tuple[str, tuple[str, ...]]], sharding: Sharding) -> Iterator[str]:
    """Yields a drawing of an array: boxes are its parts, numbers the devices that hold each.

    `cuts` are logical axes, one at least, each with the mesh axes that split it. The first goes
    down, the second across; devices count along the mesh, its last axis fastest.
    """
    down, across = [*cuts, ("", ())][:2]
    texts = [
        _shortened([" ".join(_shortened(list(map(str, cell)), "…")) for cell in row], "…")
        for row in _cells(sharding, down[1], across[1])
    ]
    columns = len(texts[0])
    texts = _shortened(texts, ["…"] * columns)
    width = max(len(text) for row in texts for text in row)
    margin = max(len(down[0]), len("+".join(down[1]))) + 2
    if across[0]:
        yield f"{'':<{margin}}  {across[0]} over {'+'.join(across[1])}"

    def rule(left: str, middle: str, right: str) -> str:
        return " " * margin + left + middle.join(["─" * (width + 2)] * columns) + right

    labels = [down[0], "+".join(down[1])]
    for i, row in enumerate(texts):
        yield rule("├", "┼", "┤") if i else rule("┌", "┬", "┐")
        inside = "│".join(f" {text:^{width}} " for text in row)
        yield f"{labels[i] if i < 2 else '':>{margin - 1}} │{inside}│"
    yield rule("└", "┴", "┘")


def _cells(sharding: Sharding, down: Sequence[str], across: Sequence[str]) -> list[list[list[int]]]:
    """Returns the devices of every part, by the part's row and column."""
    shape = sharding.mesh.shape
    names = list(shape)
    numbers = np.arange(math.prod(shape.values())).reshape(tuple(shape.values()))
    order = [*down, *across, *(name for name in names if name not in (*down, *across))]
    rows, columns = (math.prod(shape[name] for name in side) for side in (down, across))
    return numbers.transpose(list(map(names.index, order))).reshape(rows, columns, -1).tolist()


def _shortened(items: list[T], gap: T) -> list[T]:
    return items if len(items) <= _SHOWN else [*items[: _SHOWN - 2], gap, items[-1]]
