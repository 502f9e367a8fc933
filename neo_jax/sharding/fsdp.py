"""Shares of a batch: what the devices that split it tell each other about parameters.

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
class Shares:
    """How the devices of a mesh share a batch and store a parameter."""

    mesh: Mesh | AbstractMesh | None
    batch: Names  # the mesh axes that split the batch
    length: Names  # and sequences, where they do not split the parameter
    split: tuple[Names, ...]  # for each axis of the parameter those axes of the batch that split it
    beside: tuple[Names, ...]  # and the other mesh axes that do
    summed: Names = ()  # mesh axes along which gradients come summed

    @classmethod
    def of(cls, sharding: Sharding | None, axes: Sequence[str | None]) -> "Shares":
        """Returns the shares of a strategy for a parameter with these logical axes."""
        if sharding is None:
            return cls(None, (), (), ((),) * len(axes), ((),) * len(axes))
        names = sharding.mesh_axes(BATCH)
        mesh = sharding.mesh
        cut: dict[str, Names] = {name: (name,) for name in names}
        if isinstance(mesh, Mesh):
            mesh, cut = along_torus(mesh, names)

        def shared(axis: str | None) -> Names:
            return sum((cut[name] for name in sharding.mesh_axes(axis) if name in cut), ())

        beside = [tuple(n for n in sharding.mesh_axes(axis) if n not in cut) for axis in axes]
        taken = {*cut, *sum(beside, ())}
        length = tuple(name for name in sharding.mesh_axes(LENGTH) if name not in taken)
        return cls(mesh, shared(BATCH), length, tuple(map(shared, axes)), tuple(beside))

    @property
    def alone(self) -> bool:
        """Whether there is one device, which has all."""
        return self.mesh is None or self.mesh.size == 1

    def gather(self, weight: Array) -> Array:
        """Returns the parameter whole, as far as the devices of the batch are concerned."""
        if not any(self.split):
            return weight
        whole = PartitionSpec(*map(_entry, self.beside))
        return self.map(self.gathered, (self.stored,), whole)(weight)

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
        outputs = [axis for axis in range(len(self.beside)) if axis not in inputs]
        lie = (
            self.rows([self.beside[i] for i in inputs]),
            self.rows([self.beside[i] for i in outputs]),
        )
        return self.map(lambda *rows: self.summed_up(product(*rows)), lie, self.stored)(x, grad)

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
        lies = PartitionSpec(self.batch, *map(_entry, self.beside))
        shares = dataclasses.replace(self, summed=self.length)
        return self.map(lambda part: shares.summed_up(part[0]), (lies,), self.stored)(parts)

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
        pairs = zip(self.beside, self.split, strict=True)
        return PartitionSpec(*(_entry(beside + split) for beside, split in pairs))

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

    def gathered(self, weight: Array) -> Array:
        """What `gather` does on a device."""
        for axis, names in enumerate(self.split):
            if names:
                weight = jax.lax.all_gather(weight, names, axis=axis, tiled=True)
        return weight

    def summed_up(self, grad: Array) -> Array:
        """Returns a device's part of the sum of what all say; within `map`."""
        for axis, names in enumerate(self.split):
            for name in names:  # in turn, see `along_torus`
                grad = jax.lax.psum_scatter(grad, name, scatter_dimension=axis, tiled=True)
        done = sum(self.split, self.summed)
        rest = tuple(name for name in self.batch + self.length if name not in done)
        return jax.lax.psum(grad, rest) if rest else grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def look_up(shares: Shares, table: Array, ids: Array) -> Array:
    """Returns the rows of a table, [rows, D], for ids, [B, T]; ids outside take the last or first.

    Each device looks up a part of the width for all, and sends every share what it asked for: far
    less than the table, and than its gradient.
    """
    if shares.mesh is None:
        return _rows_of(table, ids)
    if ids.shape[1] % shares.num_parts(shares.length):
        shares = dataclasses.replace(shares, length=())  # tokens that are appended to a cache
    of_rows, of_width = shares.beside
    _, width = shares.split

    def of_device(table: Array, ids: Array) -> Array:
        table = dataclasses.replace(shares, split=(shares.split[0], ())).gathered(table)
        here, is_here = _places(shares, table, ids)
        found = jnp.where(is_here[..., None], _rows_of(table, here), 0)
        found = jax.lax.psum(found, of_rows) if of_rows else found
        return jax.lax.all_to_all(found, width, 0, 2, tiled=True) if width else found

    takes = (shares.stored, shares.rows())
    return shares.map(of_device, takes, shares.rows([of_width]))(table, ids)


def _look_up_forward(shares: Shares, table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return look_up(shares, table, ids), (table, ids)


def _look_up_backward(
    shares: Shares, saved: tuple[Array, Array], grad: Array
) -> tuple[Array, None]:
    _, of_width = shares.beside
    rows, width = shares.split

    def of_device(table: Array, ids: Array, grad: Array) -> Array:
        grad = jax.lax.all_to_all(grad, width, 2, 0, tiled=True) if width else grad
        total = jnp.zeros((table.shape[0] * shares.num_parts(rows), table.shape[1]), table.dtype)
        here, is_here = _places(shares, total, ids)
        total = total.at[jnp.where(is_here, here, len(total))].add(grad, mode="drop")
        # What came from other shares is summed already.
        return dataclasses.replace(shares, split=(rows, ()), summed=width).summed_up(total)

    if shares.mesh is None:
        table, ids = saved
        return jnp.zeros_like(table).at[jnp.clip(ids, 0, len(table) - 1)].add(grad), None
    takes = (shares.stored, shares.rows(), shares.rows([of_width]))
    return shares.map(of_device, takes, shares.stored)(*saved, grad), None


look_up.defvjp(_look_up_forward, _look_up_backward)


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


def _places(shares: Shares, table: Array, ids: Array) -> tuple[Array, Array]:
    """Returns where in a device's rows of a table ids are, for all shares, and which are there."""
    of_rows, (_, width) = shares.beside[0], shares.split
    ids = jnp.clip(ids, 0, len(table) * shares.num_parts(of_rows) - 1)
    ids = jax.lax.all_gather(ids, width, axis=0, tiled=True) if width else ids
    here = ids - (jax.lax.axis_index(of_rows) * len(table) if of_rows else 0)
    return here, (here >= 0) & (here < len(table))


def _entry(names: Names) -> Names | None:
    return names or None


def within_share(sharding: Sharding | None) -> Sharding | None:
    """Returns what is left of a strategy within `map_share`, where axes of the batch are taken."""
    rules = _rules_beside_batch(sharding) if sharding else ()
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
    used = Sharding(sharding.mesh, _rules_beside_batch(sharding))
    for place in (sharding, used):  # stored first, so that the gradient ends up there
        weight = constrain(place, weight, axes, name)
    return weight


def _rules_beside_batch(sharding: Sharding) -> Rules:
    """Returns the rules without the mesh axes that split the batch."""
    batch = sharding.mesh_axes(BATCH)
    rules = ((axis, tuple(n for n in names if n not in batch)) for axis, names in sharding.rules)
    return tuple((axis, names) for axis, names in rules if names)
