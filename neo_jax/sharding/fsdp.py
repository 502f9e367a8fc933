"""Fully sharded data parallelism: what devices that split tokens exchange of parameters.

Where a parameter is split over the same devices as the batch, or its width over those that split
sequences (fsdp), each gathers what it needs as it needs it, and keeps its part of every gradient's
sum. These exchanges are written out here, so that nothing else moves; what activations need along
other mesh axes is left to the compiler.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from neo_jax.axes import BATCH, EMBED, LENGTH, POSITIONS, Array, Float, Int
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
    length: Names  # and sequences, where they do not split the parameter for good
    # For each axis of the parameter those mesh axes along which it is gathered, and the others.
    fsdp_axes: tuple[Names, ...]
    other_axes: tuple[Names, ...]
    summed: Names = ()  # mesh axes along which gradients come summed

    @classmethod
    def of(cls, sharding: Sharding | None, axes: Sequence[str | None]) -> "FsdpLayout":
        """Returns the layout that a strategy has for a parameter with these logical axes."""
        if sharding is None:
            return cls(None, (), (), ((),) * len(axes), ((),) * len(axes))
        gathered: list[Names] = []
        others: list[Names] = []
        for axis in axes:
            names = sharding.mesh_axes(axis)
            gathered.append(tuple(name for name in names if _gathers(sharding, axis, name)))
            others.append(tuple(name for name in names if name not in gathered[-1]))
        batch, kept = sharding.mesh_axes(BATCH), sum(others, ())
        length = tuple(name for name in sharding.mesh_axes(LENGTH) if name not in batch + kept)
        mesh, cut = torus_axes(sharding, batch + length)
        parts = functools.partial(_parts, cut)
        return cls(mesh, parts(batch), parts(length), tuple(map(parts, gathered)), tuple(others))

    @property
    def is_single(self) -> bool:
        """Whether there is one device, which has all."""
        return self.mesh is None or self.mesh.size == 1

    @property
    def share(self) -> Names:
        """The mesh axes that split tokens: rows of the batch, and sequences."""
        return self.batch + self.length

    def gather(self, weight: AnyArray) -> AnyArray:
        """Returns the parameter whole along the mesh axes that split tokens."""
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
        """Returns the gradient of the parameter, where it is stored, summed over all tokens.

        Args:
          product: gives the gradient for some rows, from x and grad.
          x: what the parameter was multiplied by.
          grad: of the result.
          inputs: which axes of the parameter are inputs.
        """
        if not self.share:
            return product(x, grad)
        outputs = [axis for axis in range(len(self.other_axes)) if axis not in inputs]
        takes = tuple(self.rows([self.other_axes[i] for i in kept]) for kept in (inputs, outputs))
        reduced = self.map(lambda *rows: self.reduce_gradient(product(*rows)), takes, self.stored)
        return reduced(x, grad)

    def map_share(self, function: Callable[..., Any], takes: Any, gives: Any) -> Any:
        """Returns a function of whole arrays that does this to each share of the batch.

        A share is what the devices of one place along the mesh axes that split tokens have. The
        function may not exchange arrays; the other mesh axes are left to the compiler.
        """
        return self.map(function, takes, gives, self.share) if self.share else function

    def sum_parts(self, parts: Float[Array, "shares *weight"]) -> Float[Array, "*weight"]:
        """Returns the gradient of the parameter, where it is stored, from each share's part."""
        if not self.share:
            return parts[0]
        takes = (PartitionSpec(self.share, *self.other_axes),)
        return self.map(lambda part: self.reduce_gradient(part[0]), takes, self.stored)(parts)

    def sum(self, scalars: Any) -> Any:
        """Returns the sums over all shares of scalars that each has; within `map_share`."""
        return jax.lax.psum(scalars, self.share) if self.share else scalars

    def num_parts(self, names: Names) -> int:
        """Returns into how many parts mesh axes split something."""
        assert self.mesh is not None
        return math.prod(self.mesh.shape[name] for name in names)

    @property
    def by_share(self) -> PartitionSpec:
        """The PartitionSpec of an array whose first axis is split over the shares."""
        return PartitionSpec(self.share)

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
        rest = tuple(name for name in self.share if name not in done)
        return jax.lax.psum(grad, rest) if rest else grad


def _parts(cut: Mapping[str, Names], names: Names) -> Names:
    return sum((cut[name] for name in names), ())


def torus_axes(sharding: Sharding, names: Names) -> tuple[Mesh | AbstractMesh, Mapping[str, Names]]:
    """Returns a strategy's mesh cut along the torus, and what became of axes; see `along_torus`."""
    mesh = sharding.mesh
    if isinstance(mesh, Mesh):
        return along_torus(mesh, names)
    return mesh, {name: (name,) for name in names}


def inside_share(sharding: Sharding | None, layout: FsdpLayout) -> Sharding | None:
    """Returns what is left of a strategy within `map_share`, where the share's axes are taken."""
    if sharding is None:
        return None
    kept = sum(layout.other_axes, ())
    share = sharding.mesh_axes(BATCH) + sharding.mesh_axes(LENGTH)
    taken = [name for name in share if name not in kept]
    rules = _rules_without(sharding, lambda _, name: name in taken)
    if not rules:
        return None
    mesh = jax.sharding.get_abstract_mesh() if layout.share else sharding.mesh
    return Sharding(mesh, rules)


def gather(
    sharding: Sharding | None,
    weight: Float[Array, "*weight"],
    axes: Sequence[str | None],
    name: str,
) -> Float[Array, "*weight"]:
    """Returns a parameter whole along the mesh axes that split tokens; the compiler gathers it.

    Its gradient goes the other way, summed over all tokens and split again.
    """
    if sharding is None:
        return weight
    used = Sharding(sharding.mesh, _rules_without(sharding, functools.partial(_gathers, sharding)))
    for place in (sharding, used):  # stored first, so that the gradient ends up there
        weight = constrain(place, weight, axes, name)
    return weight


def _gathers(sharding: Sharding, axis: str | None, name: str) -> bool:
    """Returns whether a parameter that a mesh axis splits so is gathered along it to be used.

    What splits sequences may split heads, the MLP or the vocabulary too: these then stay split.
    """
    in_length = name in sharding.mesh_axes(LENGTH) and axis in (EMBED, POSITIONS)
    return in_length or name in sharding.mesh_axes(BATCH)


def _rules_without(sharding: Sharding, is_taken: Callable[[str, str], bool]) -> Rules:
    """Returns the rules without the mesh axes that are taken of a logical axis."""
    rules = (
        (axis, tuple(name for name in names if not is_taken(axis, name)))
        for axis, names in sharding.rules
    )
    return tuple((axis, names) for axis, names in rules if names)
