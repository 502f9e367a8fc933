"""Rows of a table by their ids, with a gradient, where the table is sharded as a batch is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from neo_jax.axes import Array, Float, Int
from neo_jax.sharding.fsdp import FsdpLayout


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def embedding_lookup(
    layout: FsdpLayout, table: Float[Array, "V D"] | Int[Array, "V D"], ids: Int[Array, "B T"]
) -> Float[Array, "B T D"] | Int[Array, "B T D"]:
    """Returns the rows of a table for ids; ids outside take the last or first row.

    Each device looks up a part of the width for all, and sends every other one what that requested:
    far less than the table, and than its gradient.
    """
    if layout.mesh is None:
        return _take(table, ids)
    if ids.shape[1] % layout.num_parts(layout.length):
        layout = dataclasses.replace(layout, length=())  # tokens that are appended to a cache
    of_rows, of_width = layout.other_axes
    _, width = layout.fsdp_axes

    def of_device(table: Array, ids: Array) -> Array:
        table = dataclasses.replace(layout, fsdp_axes=(layout.fsdp_axes[0], ())).all_gather(table)
        here, is_here = _places(layout, table, ids)
        found = jnp.where(is_here[..., None], _take(table, here), 0)
        found = jax.lax.psum(found, of_rows) if of_rows else found
        return jax.lax.all_to_all(found, width, 0, 2, tiled=True) if width else found

    takes = (layout.stored, layout.rows())
    return layout.map(of_device, takes, layout.rows([of_width]))(table, ids)


def _forward(layout: FsdpLayout, table: Array, ids: Array) -> tuple[Array, tuple[Array, Array]]:
    return embedding_lookup(layout, table, ids), (table, ids)


def _backward(layout: FsdpLayout, saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    if layout.mesh is None:
        table, ids = saved
        return jnp.zeros_like(table).at[jnp.clip(ids, 0, len(table) - 1)].add(grad), None
    _, of_width = layout.other_axes
    rows, width = layout.fsdp_axes

    def of_device(table: Array, ids: Array, grad: Array) -> Array:
        grad = jax.lax.all_to_all(grad, width, 2, 0, tiled=True) if width else grad
        total = jnp.zeros((table.shape[0] * layout.num_parts(rows), table.shape[1]), table.dtype)
        here, is_here = _places(layout, total, ids)
        total = total.at[jnp.where(is_here, here, len(total))].add(grad, mode="drop")
        # What came from other devices is summed already.
        of_rows = dataclasses.replace(layout, fsdp_axes=(rows, ()), summed=width)
        return of_rows.reduce_gradient(total)

    takes = (layout.stored, layout.rows(), layout.rows([of_width]))
    return layout.map(of_device, takes, layout.stored)(*saved, grad), None


embedding_lookup.defvjp(_forward, _backward)


def _take(table: Array, ids: Array) -> Array:
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
    """Returns where in a device's rows of a table all devices' ids are, and which are there."""
    of_rows, (_, width) = layout.other_axes[0], layout.fsdp_axes
    ids = jnp.clip(ids, 0, len(table) * layout.num_parts(of_rows) - 1)
    ids = jax.lax.all_gather(ids, width, axis=0, tiled=True) if width else ids
    here = ids - (jax.lax.axis_index(of_rows) * len(table) if of_rows else 0)
    return here, (here >= 0) & (here < len(table))
