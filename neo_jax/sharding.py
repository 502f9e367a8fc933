"""Where arrays live: a mesh of devices, and rules from logical axes to mesh axes.

A strategy is two lines of text, here and on the command line:

    mesh  = "data=2,fsdp=4"
    rules = "batch:data+fsdp,embed:fsdp"

Every PartitionSpec of the package is made in this file.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from neo_jax.axes import LOGICAL_AXES, Array
from neo_jax.errors import NeoError, suggest

MESH_AXES = ("data", "fsdp", "model")

DEFAULT_RULES = "batch:data+fsdp,embed:fsdp,heads:model,mlp:model"
"""What an unnamed strategy does: split the batch, shard weights over fsdp, heads over model."""


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the table from logical axis to mesh axes. Hashable, immutable, no global state."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int], path: str = "array"
    ) -> PartitionSpec:
        """Returns the PartitionSpec of an array with these logical axes and sizes.

        Raises:
          NeoError: a size is not divisible by its mesh axes, or one mesh axis would split two axes
            of the same array; the message names the array, the axis, the sizes and the mend.
        """
        table = dict(self.rules)
        entries: list[tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for axis, size in zip(axes, shape, strict=True):
            mesh_axes = table.get(axis, ()) if axis else ()
            for name in mesh_axes:
                if name in used:
                    raise NeoError(
                        f"{path}: mesh axis '{name}' would split both '{used[name]}' and '{axis}'; "
                        f"drop one of the two from the rules."
                    )
                used[name] = str(axis)
            parts = self._num_parts(axis)
            if size % parts:
                raise NeoError(
                    f"{path}: axis '{axis}' of size {size} does not divide over {parts} devices "
                    f"of {'+'.join(mesh_axes)}; change the mesh or drop '{axis}' from the rules."
                )
            entries.append(mesh_axes or None)
        return PartitionSpec(*entries)

    def named(
        self, axes: Sequence[str | None], shape: Sequence[int], path: str = "array"
    ) -> NamedSharding:
        """Like `spec`, bound to the mesh: what `jax.device_put` and `jax.jit` take."""
        return NamedSharding(self.mesh, self.spec(axes, shape, path))

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """Tells the compiler how an activation with these logical axes lies on the mesh.

        An axis that does not divide, such as the batch of a single prompt, is not split: the
        parameters are, and they decide whether a model fits.
        """
        whole = [
            axis if size % self._num_parts(axis) == 0 else None
            for axis, size in zip(axes, x.shape, strict=True)
        ]
        return jax.lax.with_sharding_constraint(x, self.named(whole, x.shape, "activation"))

    def _num_parts(self, axis: str | None) -> int:
        """Returns over how many devices the rules split an axis."""
        mesh_axes = dict(self.rules).get(axis, ()) if axis else ()
        return math.prod(self.mesh.shape[name] for name in mesh_axes)


def make_sharding(mesh: str = "", rules: str = "") -> Sharding | None:
    """Builds a strategy from its text; returns None where no mesh is asked for.

    Args:
      mesh: sizes of mesh axes, "data=2,fsdp=4"; one size may be -1 and takes what is left.
      rules: logical axis to mesh axes, "batch:data+fsdp,embed:fsdp"; empty for `DEFAULT_RULES`
        restricted to the axes of the mesh.

    Raises:
      NeoError: unknown names, sizes that are no numbers, or a mesh that does not fit the devices.
    """
    if not mesh:
        if rules:
            raise NeoError("--rules needs a mesh; add for example --mesh fsdp=-1.")
        return None
    sizes = _parse_mesh(mesh, jax.device_count())
    devices = np.asarray(jax.devices()[: math.prod(sizes.values())])
    built = Mesh(
        devices.reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )
    return Sharding(built, _parse_rules(rules, sizes) if rules else _default_rules(sizes))


def _parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = entry.strip().partition("=")
        if name not in MESH_AXES:
            raise NeoError(f"unknown mesh axis '{name}' in '{text}'.{suggest(name, MESH_AXES)}")
        if not re.fullmatch("-1|[1-9][0-9]*", size):
            raise NeoError(f"mesh axis '{entry}' needs a size, as in '{name}=2' (-1 fills).")
        if name in sizes:
            raise NeoError(f"mesh '{text}' names the axis '{name}' twice; give it one size.")
        sizes[name] = int(size)
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if list(sizes.values()).count(-1) > 1:
        raise NeoError(f"mesh '{text}' has more than one -1; give all sizes but one.")
    if -1 in sizes.values():
        sizes = {name: num_devices // fixed if n == -1 else n for name, n in sizes.items()}
    if math.prod(sizes.values()) != num_devices:
        raise NeoError(
            f"mesh '{text}' asks for {math.prod(sizes.values()) or fixed} devices, "
            f"but {num_devices} are here; one size may be -1 to take what is left."
        )
    return sizes


def _parse_rules(text: str, sizes: Mapping[str, int]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    rules: dict[str, tuple[str, ...]] = {}
    for entry in text.split(","):
        axis, _, target = entry.strip().partition(":")
        if axis not in LOGICAL_AXES:
            raise NeoError(
                f"unknown logical axis '{axis}' in the rules.{suggest(axis, LOGICAL_AXES)}"
            )
        if axis in rules:
            raise NeoError(f"the rules name the axis '{axis}' twice; join targets as in 'x:a+b'.")
        mesh_axes = tuple(target.split("+"))
        for name in mesh_axes:
            if name not in sizes:
                raise NeoError(f"rule '{entry}' names no axis of the mesh.{suggest(name, sizes)}")
        rules[axis] = mesh_axes
    return tuple(rules.items())


def _default_rules(sizes: Mapping[str, int]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The default table without the mesh axes that this mesh does not have."""
    table = []
    for entry in DEFAULT_RULES.split(","):
        axis, _, target = entry.partition(":")
        mesh_axes = tuple(name for name in target.split("+") if name in sizes)
        if mesh_axes:
            table.append((axis, mesh_axes))
    return tuple(table)


def tree_shardings(sharding: Sharding, axes: Any, shapes: Any) -> Any:
    """Returns the tree of NamedShardings for a tree of arrays or ShapeDtypeStructs.

    Args:
      sharding: the strategy.
      axes: a tree like `shapes` with a tuple of logical axes at each leaf.
      shapes: anything with `.shape` at its leaves.
    """
    return jax.tree.map_with_path(
        lambda path, leaf, names: sharding.named(
            names, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="/")
        ),
        shapes,
        axes,
    )
