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

from neo_jax.axes import BATCH, LENGTH, Array, Float, Int
from neo_jax.devices.torus import along_torus
from neo_jax.sharding.rules import Rules, Sharding, constrain

Names = tuple[str, ...]
AnyArray = Float[Array, "..."] | Int[Array, "..."]

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

    def gather(self, weight: AnyArray) -> AnyArray:
        """Returns the parameter whole along the mesh axes of the batch."""
        if not any(self.fsdp_axes):
            return weight
        whole = PartitionSpec(*self.other_axes)
        return self.map(self.all_gather, (self.stored,), whole)(weight)

    def gradient(
        self,
        product: Callable[..., Array],
        x: Float[Array, "B T *inputs"],
        grad: Float[Array, "B T *outputs"],
        inputs: Sequence[int],
    ) -> Float[Array, "..."]:
        """Returns the gradient of the parameter, where it is stored, summed over the batch.

        Args:
          product: gives the gradient for some rows, from x and grad.
          x: what the parameter was multiplied by.
          grad: of the result.
          inputs: which axes of the parameter are inputs.
        """
        if not self.batch:
            return product(x, grad)
        outputs = [axis for axis in range(len(self.other_axes)) if axis not in inputs]
        takes = tuple(self.rows([self.other_axes[i] for i in kept]) for kept in (inputs, outputs))
        reduced = self.map(lambda *rows: self.reduce_gradient(product(*rows)), takes, self.stored)
        return reduced(x, grad)

    def map_share(self, function: Callable[..., Any], takes: Any, gives: Any) -> Any:
        """Returns a function of whole arrays that does this to each share of the batch.

        A share is what the devices of one place along the batch's mesh axes have. The function may
        not exchange arrays; the other mesh axes are left to the compiler.
        """
        return self.map(function, takes, gives, self.batch) if self.batch else function

    def sum_parts(self, parts: Float[Array, "shares *weight"]) -> Float[Array, "*weight"]:
        """Returns the gradient of the parameter, where it is stored, from each share's part."""
        if not self.batch:
            return parts[0]
        takes = (PartitionSpec(self.batch, *self.other_axes),)
        layout = dataclasses.replace(self, summed=self.length)
        return self.map(lambda part: layout.reduce_gradient(part[0]), takes, self.stored)(parts)

    def sum(self, scalars: Any) -> Any:
        """Returns the sums over all shares of scalars that each has; within `map_share`."""
        return jax.lax.psum(scalars, self.batch) if self.batch else scalars

    def num_parts(self, names: Names) -> int:
        """Returns into how many parts mesh axes split something."""
        assert self.mesh is not None
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def by_share(self) -> PartitionSpec:
        """The PartitionSpec of an array whose first axis is split over the shares."""
        return PartitionSpec(self.batch)

    @property
    def stored(self) -> PartitionSpec:
        """The PartitionSpec of the parameter."""
        pairs = zip(self.other_axes, self.fsdp_axes, strict=True)
        return PartitionSpec(*(others + fsdp for others, fsdp in pairs))

    def rows(self, split: Sequence[Names] = ()) -> PartitionSpec:
        """The PartitionSpec of activations, [B, T, ...]; further axes are split as given."""
        return PartitionSpec(self.batch, self.length, *split)

    def map(
        self, function: Callable[..., Any], takes: Any, gives: Any, names: Names = ()
    ) -> Callable[..., Any]:
        """Returns a function of whole arrays that does this on every device.

        It maps over the mesh axes of these names, or if there are none over all.
        """
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=takes,
            out_specs=gives,
            axis_names=set(names),
            check_vma=False,
        )

    def all_gather(self, weight: AnyArray) -> AnyArray:
        """What `gather` does on a device."""
        for axis, names in enumerate(self.fsdp_axes):
            if names:
                weight = jax.lax.all_gather(weight, names, axis=axis, tiled=True)
        return weight

    def reduce_gradient(self, grad: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns a device's part of the sum over all devices; within `map`."""
        for axis, names in enumerate(self.fsdp_axes):
            for name in names:  # in turn, see `along_torus`
                grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
        done = sum(self.fsdp_axes, self.summed)
        rest = tuple(name for name in self.batch + self.length if name not in done)
        return jax.lax.psum(grad, rest) if rest else grad


def inside_fsdp(sharding: Sharding | None) -> Sharding | None:
    """Returns what is left of a strategy within `map_share`, where axes of the batch are taken."""
    rules = _rules_without_batch(sharding) if sharding else ()
    if sharding is None or not rules:
        return None
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh_axes(BATCH) else sharding.mesh
    return Sharding(mesh, rules)


def gather(
    sharding: Sharding | None,
    weight: Float[Array, "*weight"],
    axes: Sequence[str | None],
    name: str,
) -> Float[Array, "*weight"]:
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
