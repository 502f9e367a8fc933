"""Where arrays live: a mesh of devices, and rules from logical to mesh axes.

A strategy is two lines of text, the same in configs, on the command line and in Python:

    mesh  = "data=2,fsdp=4,model=2"
    rules = "embed:fsdp,heads:model,mlp:model,vocab:model", or the name of a strategy: "fsdp+tensor"

This table places every parameter, optimizer slot, activation and cache leaf: every PartitionSpec of
the package is made from it, here and in `shares`. What the table cannot do is an error.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from neo_jax.axes import BATCH, LENGTH, LOGICAL_AXES, Array
from neo_jax.devices.torus import arrange
from neo_jax.errors import NeoError, brief, suggest

MESH_AXES = ("data", "fsdp", "model", "context")

STRATEGIES = {
    # Every device holds the whole model and works on its share of the batch.
    "data": ("data=-1", ""),
    # Weights and optimizer are split as well, and gathered as they are needed: ZeRO, stage 3
    # (Rajbhandari et al., 2020).
    "fsdp": ("fsdp=-1", "embed:fsdp"),
    # Heads, MLP and vocabulary are split, activations summed: Megatron (Shoeybi et al., 2019).
    "tensor": ("model=-1", "heads:model,mlp:model,vocab:model"),
    "fsdp+tensor": ("fsdp=-1,model=2", "embed:fsdp,heads:model,mlp:model,vocab:model"),
    # Sequences are split too, and weights over the same devices as over those of the batch: see
    # `neo_jax.ops.attention.context`.
    "context": (
        "context=-1",
        "length:context,embed:fsdp+context,heads:model,mlp:model,vocab:model",
    ),
    # Weights are split by both axes that the mesh may have and stay; activations, small in
    # decoding, travel: the 2D weight-stationary layout of Pope et al., 2022. Prompts and the slots
    # of caches are split where the mesh has an axis for them.
    "decode": (
        "model=-1",
        "batch:data,embed:fsdp,heads:model,mlp:model,vocab:model,length:context,kv_length:context",
    ),
}
"""The named strategies: a mesh, taken where none is given, whose axes each needs; and rules."""

_BATCH_AXES = ("data", "fsdp")  # split the batch where the rules do not name it

_MOST_DEVICES = 2**20  # of a mesh that is drawn; the largest that exist have some thousands

Rules = tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and the table from logical axis to mesh axes. Hashable, immutable, no global state."""

    mesh: Mesh | AbstractMesh
    rules: Rules

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis, none where it stays whole."""
        return dict(self.rules).get(axis, ()) if axis else ()

    def num_shards(self, axis: str | None) -> int:
        """Returns into how many parts the rules split an axis."""
        return self.num_shards_of(self.mesh_axes(axis))

    def num_shards_of(self, names: Sequence[str]) -> int:
        """Returns into how many parts mesh axes split something."""
        return math.prod(self.mesh.shape[name] for name in names)

    def spec(
        self, axes: Sequence[str | None], shape: Sequence[int], path: str = "array"
    ) -> PartitionSpec:
        """Returns the PartitionSpec of an array with these logical axes and sizes.

        Raises:
          NeoError: a size is not divisible by its mesh axes, or one mesh axis would split two axes
            of the same array; the message names the array, the axes, the sizes and the fix.
        """
        used: dict[str, str] = {}
        for axis, size in zip(axes, shape, strict=True):
            mesh_axes = self.mesh_axes(axis)
            for name in mesh_axes:
                here = f"'{axis}' of size {size}"
                if name in used:
                    raise NeoError(
                        f"{path}: mesh axis '{name}' of {self.mesh.shape[name]} devices would "
                        f"split both {used[name]} and {here}; drop one of the two from the rules."
                    )
                used[name] = here
            if size % self.num_shards(axis):
                fix = f"change the mesh or drop '{axis}' from the rules"
                if axis == BATCH:
                    fix = f"choose a multiple of {self.num_shards(axis)}, or the rule 'batch:'"
                if axis == LENGTH:
                    fix = f"choose a multiple of {self.num_shards(axis)}, or drop 'length'"
                raise NeoError(
                    f"{path}: axis '{axis}' of size {size} does not divide over "
                    f"{self.num_shards(axis)} devices of {'+'.join(mesh_axes)}; {fix}."
                )
        return PartitionSpec(*(self.mesh_axes(axis) for axis in axes))

    def named(
        self, axes: Sequence[str | None], shape: Sequence[int], path: str = "array"
    ) -> NamedSharding:
        """Like `spec`, bound to the mesh: what `jax.device_put` and `jax.jit` take."""
        return NamedSharding(self.mesh, self.spec(axes, shape, path))


def constrain(
    sharding: Sharding | None, x: Array, axes: Sequence[str | EllipsisType | None], name: str
) -> Array:
    """Tells the compiler how an activation is sharded; without a strategy returns it as it is.

    In its logical axes None is one that stays whole, ... one that the compiler places. Errors call
    it by `name`.

    Raises:
      NeoError: see `Sharding.spec`.
    """
    if sharding is None:
        return x
    entries = sharding.spec([axis if axis is not ... else None for axis in axes], x.shape, name)
    spec = PartitionSpec(
        *(
            PartitionSpec.UNCONSTRAINED if axis is ... else entry
            for axis, entry in zip(axes, entries, strict=True)
        )
    )
    return jax.lax.with_sharding_constraint(x, NamedSharding(sharding.mesh, spec))


def pick(x: Array, ids: Array) -> Array:
    """Returns the entries at `ids`, [...], of the last axis of `x`, [..., V], which may be split.

    A sum of which all terms but one are zero. Of a gather along a split axis XLA's partitioner
    aborts the process where a second mesh axis splits rows and a third one is taken by a share.
    """
    here = jax.lax.broadcasted_iota(ids.dtype, x.shape, x.ndim - 1) == ids[..., None]
    return jnp.sum(jnp.where(here, x, 0), axis=-1)


def device_of(sharding: Sharding | None) -> jax.Device:
    """Returns one device, to tell their kind by: of the mesh, or of this process if it has none."""
    if sharding is None or isinstance(sharding.mesh, AbstractMesh):
        return jax.local_devices()[0]
    return sharding.mesh.devices.flat[0]


def padded_rows(sharding: Sharding | None, rows: int) -> int:
    """Returns the least number of rows, at least `rows`, that the batch axis can be split into."""
    shards = sharding.num_shards(BATCH) if sharding else 1
    return -(-rows // shards) * shards


def filled(
    sharding: Sharding | None, tokens: Array, positions: Array | None
) -> tuple[Array, Array | None]:
    """Returns sequences [B, T] that divide over the devices that share each, and their positions.

    What is added on the right has the position -1: it is not there.
    """
    rest = -tokens.shape[1] % (sharding.num_shards(LENGTH) if sharding else 1)
    if not rest:
        return tokens, positions
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    fill = ((0, 0), (0, rest))
    return jnp.pad(tokens, fill), jnp.pad(positions, fill, constant_values=-1)


def tree_shardings(sharding: Sharding, axes: Any, shapes: Any) -> Any:
    """Returns the tree of NamedShardings for a tree of arrays or ShapeDtypeStructs.

    `axes` is a tree like `shapes` with a tuple of logical axes at each leaf.

    Raises:
      NeoError: see `Sharding.spec`; the message names the leaf.
    """
    return jax.tree.map_with_path(
        lambda path, leaf, names: sharding.named(
            names, leaf.shape, jax.tree_util.keystr(path, simple=True, separator="/")
        ),
        shapes,
        axes,
    )


def make_sharding(
    mesh: str = "",
    rules: str = "",
    devices: Sequence[jax.Device] | int | None = None,
    default: str = "fsdp+tensor",
) -> Sharding | None:
    """Builds a strategy from its text; returns None where none is given.

    Args:
      mesh: sizes of mesh axes, "data=2,fsdp=4"; one size may be -1 and takes what is left.
      rules: a name of `STRATEGIES`, or logical axis to mesh axes, "batch:data,embed:fsdp+model".
        Rules that do not name the batch split it over data and fsdp; "batch:" leaves it whole.
      devices: what to lay the mesh over, all of them; by default all that are here, of which one
        process alone leaves out what a mesh of fixed sizes does not ask for. A number stands for
        that many that are not there: such a strategy can be traced and looked at, but not run.
      default: the strategy of a mesh without rules, as far as it has the axes.

    Raises:
      NeoError: unknown names, a mesh that does not fit the devices, a strategy whose axes the mesh
        lacks, or a mesh axis that would split nothing.
    """
    for name, value in (("mesh", mesh), ("rules", rules)):
        if not isinstance(value, str):
            raise NeoError(f"{name} must be a text, not {brief(value)}.")
    if rules and rules not in STRATEGIES and not re.search("[:,]", rules):
        raise NeoError(f"no strategy is called '{rules}'.{suggest(rules, STRATEGIES)}")
    if not mesh:
        if not rules:
            return None
        if rules not in STRATEGIES:
            raise NeoError("--rules needs a mesh; add for example --mesh fsdp=-1.")
        mesh = STRATEGIES[rules][0]
    some = devices is None and jax.process_count() == 1
    if devices is None:
        devices = jax.devices()
    sizes = _parse_mesh(mesh, devices if isinstance(devices, int) else len(devices), some)
    table = _table(rules, sizes, default)
    _check_all_used(mesh, rules, table, sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    auto = (AxisType.Auto,) * len(sizes)
    if isinstance(devices, int):
        return Sharding(AbstractMesh(shape, names, axis_types=auto), table)
    chosen = devices[: math.prod(shape)]
    return Sharding(Mesh(arrange(sizes, chosen), names, axis_types=auto), table)


def _parse_mesh(text: str, num_devices: int, some: bool) -> dict[str, int]:
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
    elif fixed > _MOST_DEVICES:
        raise NeoError(f"mesh '{text}' has more than {_MOST_DEVICES} devices; make it smaller.")
    elif some and fixed < num_devices:
        return sizes
    if math.prod(sizes.values()) != num_devices:
        raise NeoError(
            f"mesh '{text}' asks for {math.prod(sizes.values()) or fixed} devices, "
            f"but {num_devices} are here; one size may be -1 to take what is left."
        )
    return sizes


def _table(rules: str, sizes: Mapping[str, int], default: str) -> Rules:
    """Returns the rules of a strategy by name, or as they are written out, for a mesh."""
    if rules and rules not in STRATEGIES:
        table = _parse_rules(rules)
        for axis, targets in table.items():
            for name in targets:
                if name not in sizes:
                    raise NeoError(
                        f"rule '{axis}:{'+'.join(targets)}' names no axis of the mesh."
                        f"{suggest(name, sizes)}"
                    )
    else:
        mesh, text = STRATEGIES[rules or default]
        for name in re.findall("[a-z]+", mesh if rules else ""):
            if name not in sizes:
                raise NeoError(
                    f"strategy '{rules}' needs the mesh axis '{name}'; write for example "
                    f"--mesh {mesh}."
                )
        table = {
            axis: tuple(name for name in targets if name in sizes)
            for axis, targets in _parse_rules(text).items()
        }
    table = {BATCH: tuple(name for name in _BATCH_AXES if name in sizes), **table}
    return tuple((axis, targets) for axis, targets in table.items() if targets)


def _parse_rules(text: str) -> dict[str, tuple[str, ...]]:
    table: dict[str, tuple[str, ...]] = {}
    for entry in text.split(",") if text else ():
        axis, _, target = entry.strip().partition(":")
        if axis not in LOGICAL_AXES:
            raise NeoError(
                f"unknown logical axis '{axis}' in the rules.{suggest(axis, LOGICAL_AXES)}"
            )
        if axis in table:
            raise NeoError(f"the rules name the axis '{axis}' twice; join targets as in 'x:a+b'.")
        table[axis] = tuple(target.split("+")) if target or axis != BATCH else ()
    return table


def _check_all_used(mesh: str, rules: str, table: Rules, sizes: Mapping[str, int]) -> None:
    used = {name for _, targets in table for name in targets}
    for name, size in sizes.items():
        if size > 1 and name not in used:
            by = f"the rules '{rules}'" if rules else "the default rules"
            raise NeoError(
                f"by {by} the {size} devices of mesh axis '{name}' in '{mesh}' would split "
                f"nothing; give '{name}' a rule, or leave it out of the mesh."
            )
