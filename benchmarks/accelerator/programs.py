"""Programs of several rows compiled at the same time, and random arrays without a program each."""

import functools
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from neo_jax.axes import Array
from neo_jax.ops.int8 import Int8

Case = TypeVar("Case", bound=Hashable)
Made = TypeVar("Made")


def prepare(
    make: Callable[[Case], Made], cases: Sequence[Case], at_once: int, done: bool = False
) -> Callable[[Case], Made]:
    """Returns `make`, its results of these cases made by several threads.

    Args:
      make: prepares a case.
      cases: those that will be needed.
      at_once: threads; 1 makes each only when it is needed, so that one which ends the process is
        known.
      done: whether to wait for all, so that nothing compiles while something is timed.
    """
    if at_once == 1:
        return make
    pool = ThreadPoolExecutor(at_once)
    results = {case: pool.submit(make, case) for case in cases}
    if done:
        wait(results.values())
    return lambda case: results[case].result()


def draw(shapes: Any) -> Any:
    """Draws a tree of parameters: a program for each shape is compiled, none for the whole."""
    leaves, tree = jax.tree.flatten(shapes, is_leaf=lambda leaf: isinstance(leaf, Int8))
    return tree.unflatten([_draw(jax.random.key(i), leaf) for i, leaf in enumerate(leaves)])


def _draw(key: Array, leaf: Any) -> Any:
    if isinstance(leaf, Int8):  # as if rounded from numbers of the same deviation
        scale = jnp.full(leaf.scale.shape, 0.02 / 73, leaf.scale.dtype)
        return Int8(_whole_numbers(key, leaf.values.shape), scale)
    return _normal(key, leaf.shape, jnp.dtype(leaf.dtype))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _whole_numbers(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.randint(key, shape, -127, 128, jnp.int8)
