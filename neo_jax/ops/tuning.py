"""What is chosen by platform: block sizes, unrolling, layouts of parameters, compiler options."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh

from neo_jax.axes import EMBED, HEAD_DIM, HEADS
from neo_jax.sharding.rules import Sharding, device_of

# Of a device, whose logits exist at a time. Each block reads and writes the gradient of the table:
# no small part of a TPU's traffic, while small blocks cost a CPU nothing and spare its memory.
LOSS_TOKENS, _CPU_LOSS_TOKENS = 4096, 512

FORWARD_TOKENS = 8192
"""Of a forward pass that scores, where the number of rows is not given."""
_CPU_FORWARD_TOKENS = 1024  # beyond, activations leave a CPU's caches: a third slower a row

TPU_OPTIONS = {"xla_tpu_msa_inefficient_use_to_copy_ratio": 1.0}
"""Options of a TPU's compiler: to carry into its fast memory only what so moves less.

A step appends to a cache and then reads it. By default (0.5) the compiler carries a leaf that fits
into fast memory there, appends, and carries all of it back.
"""


def loss_tokens(sharding: Sharding | None) -> int:
    """Returns how many tokens of a device have logits at a time while a loss is computed."""
    return min(LOSS_TOKENS, _CPU_LOSS_TOKENS) if _on_cpu(sharding) else LOSS_TOKENS


def forward_tokens(sharding: Sharding | None) -> int:
    """Returns how many tokens a forward pass that scores reads."""
    return min(FORWARD_TOKENS, _CPU_FORWARD_TOKENS) if _on_cpu(sharding) else FORWARD_TOKENS


def unroll(sharding: Sharding | None, num_layers: int, remat: str) -> int:
    """Returns how many units of layers training writes out: on a CPU a loop copies what it carries.

    What is computed again would there be found to be the same without a loop, and be kept.
    """
    return num_layers if _on_cpu(sharding) and remat == "none" else 1


def _on_cpu(sharding: Sharding | None) -> bool:
    return device_of(sharding).platform == "cpu"


def tpu_layout(
    place: jax.sharding.Sharding, axes: Sequence[str | None]
) -> jax.sharding.Sharding | Format:
    """Returns a parameter's place and, where a TPU would choose badly, the order of its axes there.

    A TPU keeps an array in tiles of its last two axes. Products take heads and head_dim as one
    axis; where both are in a tile, loops begin by laying the parameter out anew, a whole copy.
    """
    device: jax.Device = next(iter(place.device_set))
    if device.platform == "tpu" and tuple(axes) == (EMBED, HEADS, HEAD_DIM):
        return Format(Layout((1, 0, 2)), place)
    return place


Result = TypeVar("Result")


class Sharded(Protocol):
    """What has a strategy, as a model does."""

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
        on_tpu = device_of(model.sharding).platform == "tpu"
        return self._with_options if on_tpu and takes_options(model.sharding) else self._plain


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
