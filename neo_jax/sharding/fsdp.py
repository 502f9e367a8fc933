"""Fully sharded data parallelism: what devices that split a batch exchange of parameters.

Where a parameter is split over the same devices as the batch (fsdp), each gathers what it needs as
it needs it, and keeps its part of every gradient's sum. These exchanges are written out here, so
that nothing else moves; what activations need along other mesh axes is left to the compiler.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embedding_lookup(layout: FsdpLayout, table: Array, ids: Array) -> Array:
    """Returns the rows of a table, [rows, D], for ids, [B, T]; ids outside take the last or first.

    Each device looks up a part of the width for all, and sends every share what it asked for: far
    less than the table, and than its gradient.
    """
    if layout.mesh is None:
        return _rows_of(table, ids)
    if ids.shape[1] % layout.num_parts(layout.length):
        layout = dataclasses.replace(layout, length=())  # tokens that are appended to a cache
    of_rows, of_width = layout.other_axes
    _, width = layout.fsdp_axes

    def of_device(table: Array, ids: Array) -> Array:
        table = dataclasses.replace(layout, fsdp_axes=(layout.fsdp_axes[0], ())).all_gather(table)
        here, is_here = _places(layout, table, ids)
        found = jnp.where(is_here[..., None], _rows_of(table, here), 0)
        found = jax.lax.psum(found, of_rows) if of_rows else found
        return jax.lax.all_to_all(found, width, 0, 2, tiled=True) if width else found

    takes = (layout.stored, layout.rows())
    return layout.map(of_device, takes, layout.rows([of_width]))(table, ids)


def _lookup_forward(
    layout: FsdpLayout, table: Array, ids: Array
) -> tuple[Array, tuple[Array, Array]]:
    return embedding_lookup(layout, table, ids), (table, ids)


def _lookup_backward(
    layout: FsdpLayout, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, None]:
    _, of_width = layout.other_axes
    rows, width = layout.fsdp_axes

    def of_device(table: Array, ids: Array, grad: Array) -> Array:
        grad = jax.lax.all_to_all(grad, width, 2, 0, tiled=True) if width else grad
        total = jnp.zeros((table.shape[0] * layout.num_parts(rows), table.shape[1]), table.dtype)
        here, is_here = _places(layout, total, ids)
        total = total.at[jnp.where(is_here, here, len(total))].add(grad, mode="drop")
        # What came from other shares is summed already.
        of_rows = dataclasses.replace(layout, fsdp_axes=(rows, ()), summed=width)
        return of_rows.reduce_gradient(total)

    if layout.mesh is None:
        table, ids = saved
        return jnp.zeros_like(table).at[jnp.clip(ids, 0, len(table) - 1)].add(grad), None
    takes = (layout.stored, layout.rows(), layout.rows([of_width]))
    return layout.map(of_device, takes, layout.stored)(*saved, grad), None


embedding_lookup.defvjp(_lookup_forward, _lookup_backward)


def _rows_of(table: Array, ids: Array) -> Array:
    """Returns rows of a table; ids outside take the last or first.

    XLA's CPU backend looks rows of bfloat16 up in float32, and would make all of the table float32
    before a loop, which takes longer than a step of decoding. Behind a barrier that waits for ids
    only the rows are made float32.
    """
    take = functools.partial(jnp.take, axis=0, mode="clip")

    def take_late(table: Array, ids: Array) -> Array:
        return take(*jax.lax.optimization_barrier((table, ids)))

    if table.dtype != jnp.bfloat16:
        return take(table, ids)
    return jax.lax.platform_dependent(table, ids, cpu=take_late, default=take)


def _places(layout: FsdpLayout, table: Array, ids: Array) -> tuple[Array, Array]:
    """Returns where in a device's rows of a table ids are, for all shares, and which are there."""
    of_rows, (_, width) = layout.other_axes[0], layout.fsdp_axes
    ids = jnp.clip(ids, 0, len(table) * layout.num_parts(of_rows) - 1)
    ids = jax.lax.all_gather(ids, width, axis=0, tiled=True) if width else ids
    here = ids - (jax.lax.axis_index(of_rows) * len(table) if of_rows else 0)
    return here, (here >= 0) & (here < len(table))


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
