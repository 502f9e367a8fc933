"""Fully sharded data parallelism: what devices that split a batch exchange of parameters.

Where a parameter is split over the same devices as the batch (fsdp), each gathers what it needs as
it needs it, and keeps its part of every gradient's sum. These exchanges are written out here, so
that nothing else moves; what activations need along other mesh axes is left to the compiler.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from neo_jax.axes import BATCH, LENGTH, Array
from neo_jax.devices.torus import along_torus
from neo_jax.sharding.rules import Rules, Sharding, constrain

Names = tuple[str, ...]

EVERYWHERE = PartitionSpec()
"""What every device has."""


@dataclasses.dataclass(frozen=True)
class FsdpLayout:
    """How the devices of a mesh split a batch and store a parameter."""

    mesh: Mesh | AbstractMesh | None
    batch: Names  # the mesh axes that split the batch
    length: Names  # and sequences, where they do not split the parameter
    # For each axis of the parameter those mesh axes of the batch that split it, and the others.
    fsdp_axes: tuple[Names, ...]
    other_axes: tuple[Names, ...]
    summed: Names = ()  # mesh axes along which gradients come summed

    @classmethod
    def of(cls, sharding: Sharding | None, axes: Sequence[str | None]) -> "FsdpLayout":
        """Returns the layout that a strategy has for a parameter with these logical axes."""
        if sharding is None:
            return cls(None, (), (), ((),) * len(axes), ((),) * len(axes))
        names = sharding.mesh_axes(BATCH)
        mesh = sharding.mesh
        cut: dict[str, Names] = {name: (name,) for name in names}
        if isinstance(mesh, Mesh):
            mesh, cut = along_torus(mesh, names)

        def shared(axis: str | None) -> Names:
            return sum((cut[name] for name in sharding.mesh_axes(axis) if name in cut), ())

        others = [tuple(n for n in sharding.mesh_axes(axis) if n not in cut) for axis in axes]
        taken = {*cut, *sum(others, ())}
        length = tuple(name for name in sharding.mesh_axes(LENGTH) if name not in taken)
        return cls(mesh, shared(BATCH), length, tuple(map(shared, axes)), tuple(others))

    @property
    def is_single(self) -> bool:
        """Whether there is one device, which has all."""
        return self.mesh is None or self.mesh.size == 1

    def gather(self, weight: Array) -> Array:
        """Returns the parameter whole, as far as the devices of the batch are concerned."""
        if not any(self.fsdp_axes):
            return weight
        whole = PartitionSpec(*map(_entry, self.other_axes))
        return self.map(self.all_gather, (self.stored,), whole)(weight)

    def gradient(
        self, product: Callable[..., Array], x: Array, grad: Array, inputs: Sequence[int]
    ) -> Array:
        """Returns the gradient of the parameter, where it is stored, summed over the batch.

        Args:
          product: gives the gradient for some rows, from x and grad.
          x: what the parameter was multiplied by, [B, T, inputs...].
          grad: of the result, [B, T, outputs...].
          inputs: which axes of the parameter are inputs.
        """
        if not self.batch:
            return product(x, grad)
        outputs = [axis for axis in range(len(self.other_axes)) if axis not in inputs]
        lie = (
            self.rows([self.other_axes[i] for i in inputs]),
            self.rows([self.other_axes[i] for i in outputs]),
        )
        reduced = self.map(lambda *rows: self.reduce_gradient(product(*rows)), lie, self.stored)
        return reduced(x, grad)

    def map_share(self, function: Callable[..., Any], takes: Any, gives: Any) -> Any:
        """Returns a function of whole arrays that does this to each share of the batch.

        It may not exchange arrays; mesh axes that do not split the batch are left to the compiler.
        """
        return self._shard_map(function, takes, gives, self.batch) if self.batch else function

    def sum_parts(self, parts: Array) -> Array:
        """Returns the gradient of the parameter, where it is stored.

        Args:
          parts: what each share says of it, [shares, ...].
        """
        if not self.batch:
            return parts[0]
        lies = PartitionSpec(self.batch, *map(_entry, self.other_axes))
        layout = dataclasses.replace(self, summed=self.length)
        return self.map(lambda part: layout.reduce_gradient(part[0]), (lies,), self.stored)(parts)

    def sum(self, scalars: Any) -> Any:
        """Returns the sums over all shares of scalars that each has; within `map_share`."""
        return jax.lax.psum(scalars, self.batch) if self.batch else scalars

    def num_parts(self, names: Names) -> int:
        """Returns into how many parts mesh axes split something."""
        assert self.mesh is not None
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def by_share(self) -> PartitionSpec:
        """How an array lies that has its first axis over the shares, and is whole elsewhere."""
        return PartitionSpec(self.batch)

    @property
    def stored(self) -> PartitionSpec:
        """How the parameter lies."""
        pairs = zip(self.other_axes, self.fsdp_axes, strict=True)
        return PartitionSpec(*(_entry(others + fsdp) for others, fsdp in pairs))

    def rows(self, split: Sequence[Names] = ()) -> PartitionSpec:
        """How activations lie, [B, T, ...], their further axes split by these mesh axes."""
        return PartitionSpec(_entry(self.batch), _entry(self.length), *map(_entry, split))

    def map(self, function: Callable[..., Any], takes: Any, gives: Any) -> Callable[..., Any]:
        """Returns a function of whole arrays that does this on every device."""
        return self._shard_map(function, takes, gives, ())

    def _shard_map(
        self, function: Callable[..., Any], takes: Any, gives: Any, names: Names
    ) -> Callable[..., Any]:
        """Maps over these mesh axes, or if there are none over all."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=takes,
            out_specs=gives,
            axis_names=set(names),
            check_vma=False,
        )

    def all_gather(self, weight: Array) -> Array:
        """What `gather` does on a device."""
        for axis, names in enumerate(self.fsdp_axes):
            if names:
                weight = jax.lax.all_gather(weight, names, axis=axis, tiled=True)
        return weight

    def reduce_gradient(self, grad: Array) -> Array:
        """Returns a device's part of the sum of what all say; within `map`."""
        for axis, names in enumerate(self.fsdp_axes):
            for name in names:  # in turn, see `along_torus`
                grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
        done = sum(self.fsdp_axes, self.summed)
        rest = tuple(name for name in self.batch + self.length if name not in done)
        return jax.lax.psum(grad, rest) if rest else grad


def _entry(names: Names) -> Names | None:
    return names or None


def inside_fsdp(sharding: Sharding | None) -> Sharding | None:
    """Returns what is left of a strategy within `map_share`, where axes of the batch are taken."""
    rules = _rules_without_batch(sharding) if sharding else ()
    if sharding is None or not rules:
        return None
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh_axes(BATCH) else sharding.mesh
    return Sharding(mesh, rules)


def gather(
    sharding: Sharding | None, weight: Array, axes: Sequence[str | None], name: str
) -> Array:
    """Returns a parameter whole along the mesh axes that split the batch; the compiler gathers it.

    Its gradient goes the other way, summed over the batch and split again.
    """
    if sharding is None:
        return weight
    used = Sharding(sharding.mesh, _rules_without_batch(sharding))
    for place in (sharding, used):  # stored first, so that the gradient ends up there
        weight = constrain(place, weight, axes, name)
    return weight


def _rules_without_batch(sharding: Sharding) -> Rules:
    """Returns the rules without the mesh axes that split the batch."""
    batch = sharding.mesh_axes(BATCH)
    rules = ((axis, tuple(n for n in names if n not in batch)) for axis, names in sharding.rules)
    return tuple((axis, names) for axis, names in rules if names)
