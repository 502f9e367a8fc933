"""The functions between the two products of an MLP."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from neo_jax.axes import Array

_LINEAR = 2 * (2 / jnp.pi) ** 0.5
_CUBIC = 0.044715


@jax.custom_jvp
def gelu_new(x: Array) -> Array:
    """Returns GELU in its tanh approximation, x (1 + tanh(u / 2)) / 2 = x / (1 + exp(-u)).

    Hendrycks and Gimpel, 2016, with u = 2 sqrt(2 / pi) (x + 0.044715 x^3). A quotient at the end is
    not computed again by each of its users, as XLA would compute a product, and one of those on a
    CPU reads it transposed.
    """
    return x / (1 + jnp.exp(-_exponent(x)))


@gelu_new.defjvp
def _gelu_new_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    gate = jax.nn.sigmoid(_exponent(x))
    slope = _LINEAR * (1 + 3 * _CUBIC * x * x)
    return gelu_new(x), gate * (1 + x * (1 - gate) * slope) * dx


def _exponent(x: Array) -> Array:
    return _LINEAR * (x + _CUBIC * x * x * x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu_new": gelu_new,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""By the names that HF's configs use."""
