"""model/low_rank.py: a kernel with a product of low rank next to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.model.layers import einsum
from neo_jax.model.low_rank import LowRank

pytestmark = pytest.mark.optimized

SIZES = {"b": 3, "t": 5, "d": 96, "n": 4, "h": 24, "f": 160}
KERNELS = ["btd,nhd->btnh", "btnh,dnh->btd", "btd,fd->btf", "btf,df->btd"]


def shape(letters):
    return tuple(SIZES[letter] for letter in letters)


def adapted(rng, equation, rank=4, scale=0.5):
    """x, a `LowRank` and a gradient of the output."""
    operands, output = equation.split("->")
    x, weight = operands.split(",")
    inputs = "".join(axis for axis in weight if axis in x)
    outputs = weight.removesuffix(inputs)
    a, b = (rank, *shape(inputs)), (*shape(outputs), rank)
    shapes = (shape(x), shape(weight), a, b, shape(output))
    x, weight, a, b, grad = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return x, LowRank(weight, a, b, scale), grad


@pytest.mark.parametrize("equation", KERNELS)
def test_low_rank_is_its_formula_and_so_are_its_gradients(rng, equation):
    x, kernel, grad = adapted(rng, equation)

    def formula(x, kernel):
        change = jnp.tensordot(kernel.b, kernel.a, 1, precision="highest")
        whole = kernel.weight + kernel.scale * change
        return jnp.einsum(equation, x, whole, precision="highest")

    ours, our_pull = jax.vjp(lambda *args: einsum(equation, *args, jnp.float32), x, kernel)
    theirs, their_pull = jax.vjp(formula, x, kernel)
    merged = einsum(equation, x, kernel.merged(), jnp.float32)
    for mine, autodiff in zip(
        jax.tree.leaves((ours, merged, our_pull(grad))),
        jax.tree.leaves((theirs, theirs, their_pull(grad))),
        strict=True,
    ):
        scale = float(jnp.abs(autodiff).max())
        np.testing.assert_allclose(mine, autodiff, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_rank_of_zeros_is_its_weight_exactly(rng, dtype):
    x, kernel, _ = adapted(rng, "btd,nhd->btnh")
    kernel = LowRank(kernel.weight, kernel.a, jnp.zeros_like(kernel.b), kernel.scale)
    y = einsum("btd,nhd->btnh", x, kernel, dtype)
    np.testing.assert_array_equal(y, einsum("btd,nhd->btnh", x, kernel.weight, dtype))


def test_merging_a_stack_is_merging_each(rng):
    kernels = [adapted(rng, "btd,nhd->btnh")[1] for _ in range(3)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *kernels)
    for merged, kernel in zip(stacked.merged(), kernels, strict=True):
        np.testing.assert_allclose(merged, kernel.merged(), rtol=0, atol=1e-6)
