"""ops/matmul.py, as `einsum` calls it: products with parameters, and their gradients."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.test_util import check_grads

from neo_jax.model.layers import einsum

pytestmark = pytest.mark.optimized

SIZES = {"b": 3, "t": 5, "d": 96, "n": 4, "h": 24, "f": 160, "v": 70}
EQUATIONS = [  # every one that the model uses
    "btd,nhd->btnh",
    "btnh,dnh->btd",
    "btd,fd->btf",
    "btf,df->btd",
    "btd,vd->btv",
]


def shape(letters):
    return tuple(SIZES[letter] for letter in letters)


def parts(equation):
    operands, output = equation.split("->")
    return *operands.split(","), output


def backward(equation):
    """The two products that give the gradients of x and of the weight."""
    x, weight, output = parts(equation)
    return f"{output},{weight}->{x}", f"{x},{output}->{weight}"


def assert_product(result, equation, x, y, tolerance=1e-6):
    """Compares with float64, relative to the sum of the magnitudes that were added up."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    error = np.abs(np.asarray(result, np.float64) - np.einsum(equation, x, y))
    assert (error <= tolerance * np.einsum(equation, abs(x), abs(y))).all()


def rounded(x):
    return np.asarray(x).astype(ml_dtypes.bfloat16).astype(np.float64)


@functools.partial(jax.jit, static_argnums=(0, 4))
def with_gradients(equation, x, weight, grad, dtype):
    y, pull = jax.vjp(lambda x, weight: einsum(equation, x, weight, dtype), x, weight)
    return y, *pull(grad)


@pytest.fixture(params=EQUATIONS)
def case(request, rng):
    """An equation with x, a weight and a gradient of the output, float32."""
    shapes = [shape(letters) for letters in parts(request.param)]
    return request.param, *(rng.normal(size=shape).astype(np.float32) for shape in shapes)


def test_float32_is_the_product_and_its_gradients(case):
    equation, x, weight, grad = case
    y, grad_x, grad_weight = with_gradients(equation, x, weight, grad, jnp.float32)
    to_x, to_weight = backward(equation)
    assert_product(y, equation, x, weight)
    assert_product(grad_x, to_x, grad, weight)
    assert_product(grad_weight, to_weight, x, grad)


def test_bfloat16_rounds_the_operands_and_nothing_else(case):
    equation, x, weight, grad = case
    y, grad_x, grad_weight = with_gradients(equation, x, weight, grad, jnp.bfloat16)
    to_x, to_weight = backward(equation)
    assert_product(y, equation, rounded(x), rounded(weight))
    assert_product(grad_x, to_x, rounded(grad), rounded(weight))
    assert_product(grad_weight, to_weight, rounded(x), rounded(grad))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (2, 1), (9, 1), (1, 5), (3, 16)])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_few_tokens_of_each_row(rng, equation, rows, tokens, dtype):
    """As in decoding, where CPUs take other forms of the product."""
    x, weight, _ = parts(equation)
    x = rng.normal(size=(rows, tokens, *shape(x)[2:])).astype(dtype)
    weight = rng.normal(size=shape(weight)).astype(dtype)
    y = jax.jit(lambda x, weight: einsum(equation, x, weight, dtype))(x, weight)
    assert_product(y, equation, x, weight)


def test_gradients_are_those_of_autodiff(case):
    equation, x, weight, grad = case
    _, pull = jax.vjp(
        lambda x, weight: jnp.einsum(equation, x, weight, precision="highest"), x, weight
    )
    ours = with_gradients(equation, x, weight, grad, jnp.float32)[1:]
    for mine, autodiff in zip(ours, pull(grad), strict=True):
        scale = float(jnp.abs(autodiff).max())
        np.testing.assert_allclose(mine, autodiff, rtol=0, atol=1e-6 * scale)


def test_gradients_are_those_of_finite_differences(rng):
    shapes = ((2, 3, 4), (2, 3, 4))
    operands = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def product(*arrays):
        return einsum("btd,nhd->btnh", *map(jnp.asarray, arrays), jnp.float32)

    check_grads(product, operands, 1, ["rev"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes(dtype, x_dtype, weight_dtype):
    """The output is float32; a gradient has the dtype of what it is the gradient of."""
    x = jax.ShapeDtypeStruct((2, 3, 4), x_dtype)
    weight = jax.ShapeDtypeStruct((5, 4), weight_dtype)
    grad = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    y, grad_x, grad_weight = jax.eval_shape(
        lambda *arrays: with_gradients("btd,fd->btf", *arrays, dtype), x, weight, grad
    )
    assert y.dtype == jnp.float32
    assert (grad_x.dtype, grad_weight.dtype) == (x_dtype, weight_dtype)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [(jnp.float32, (jax.lax.Precision.HIGHEST,) * 2), (jnp.bfloat16, None)],
)
def test_every_product_states_its_precision(dtype, precision):
    """What a CPU cannot show: TPUs would round float32 operands to bfloat16 unless told."""
    x, weight, grad = jnp.ones((2, 3, 4)), jnp.ones((5, 4)), jnp.ones((2, 3, 5))
    jaxpr = jax.make_jaxpr(lambda *arrays: with_gradients("btd,fd->btf", *arrays, dtype))
    steps = equations(jaxpr(x, weight, grad).jaxpr)
    products = [step for step in steps if step.primitive.name == "dot_general"]
    assert len(products) == 3
    for product in products:
        assert {operand.aval.dtype for operand in product.invars} == {jnp.dtype(dtype)}
        assert product.params["preferred_element_type"] == jnp.float32
        assert product.params["precision"] == precision


def equations(jaxpr):
    """Every equation of a program, those of its inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
