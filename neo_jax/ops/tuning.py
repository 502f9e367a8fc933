"""How the loops of decoding are compiled: as `jax.jit` does it, with a word to a TPU's compiler."""

import functools
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from neo_jax.sharding.rules import Sharding, device_of

TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": 1.0}
"""What a TPU's compiler is told: to carry into its fast memory only what so moves less.

A step appends to a cache and then reads it. By default (0.5) the compiler carries a leaf that fits
into fast memory there, appends, and carries all of it back.
"""

Result = TypeVar("Result")


class Sharded(Protocol):
    """What says where it runs, as a model does."""

    sharding: Sharding | None


class Loop(Generic[Result]):
    """A function of a model and of other arguments, jitted for the devices of the model."""

    def __init__(self, function: Callable[..., Result], **options: Any) -> None:
        """Takes what `jax.jit` takes; the model, the first argument, is to be static."""
        functools.update_wrapper(self, function)
        self._with_options = jax.jit(function, compiler_options=TPU_OPTIONS, **options)
        self._plain = jax.jit(function, **options)

    def __call__(self, model: Sharded, *args: Any) -> Result:
        """Runs the function; compiles it where the shapes are new."""
        return self.on(model)(model, *args)

    def on(self, model: Sharded) -> Any:
        """Returns the jitted function for the devices of a model."""
        if device_of(model.sharding).platform != "tpu":
            return self._plain
        return self._with_options if takes_options(model.sharding) else self._plain


@functools.cache
def takes_options(sharding: Sharding | None) -> bool:
    """Returns whether the compiler for the TPUs of a mesh, or of this process, knows `TPU_OPTIONS`.

    Options belong to a release of libtpu; one that does not know them refuses to compile.
    """
    place = None
    if sharding and not isinstance(sharding.mesh, AbstractMesh):
        place = sharding.named((), ())
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=place)
    try:
        jax.jit(jnp.negative, compiler_options=TPU_OPTIONS).lower(number).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
