"""model/layers.py: the one product with a parameter, and the modules that own parameters."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import linen as nn
from jax.nn.initializers import normal
from jax.test_util import check_grads

from neo_jax.model.layers import Einsum, Embed, LayerNorm, einsum
from neo_jax.model.low_rank import LowRank

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


# Kernels with a product of low rank beside them.

KERNELS = [equation for equation in EQUATIONS if equation != "btd,vd->btv"]


def adapted(rng, equation, rank=4, scale=0.5):
    """x, a `LowRank` and a gradient of the output."""
    x, weight, output = parts(equation)
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


def test_einsum_adds_its_bias_along_the_last_axes(rng):
    module = Einsum((2, 3, 6), ("heads", "head_dim", "embed"), normal(1.0), ("heads", "head_dim"))
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    params = nn.meta.unbox(module.init(jax.random.key(0), "btd,nhd->btnh", x)["params"])
    assert jax.tree.map(jnp.shape, params) == {"kernel": (2, 3, 6), "bias": (2, 3)}
    assert not params["bias"].any()
    params["bias"] = jnp.arange(6.0).reshape(2, 3)
    y = module.apply({"params": params}, "btd,nhd->btnh", x)
    without = einsum("btd,nhd->btnh", x, params["kernel"], jnp.float32)
    np.testing.assert_array_equal(y, without + params["bias"][None, None])


def test_embed_looks_up_and_multiplies(rng):
    module = Embed(7, 4, "vocab", normal(1.0))
    ids = jnp.array([[0, 6, 3], [3, 3, 1]])
    params = nn.meta.unbox(module.init(jax.random.key(0), ids)["params"])
    table = np.asarray(params["embedding"])
    np.testing.assert_array_equal(module.apply({"params": params}, ids), table[np.asarray(ids)])
    outside = module.apply({"params": params}, jnp.array([[-1, 7]]))
    np.testing.assert_array_equal(outside, table[[[0, 6]]])

    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    logits = module.apply({"params": params}, x, method=Embed.attend)
    assert_product(logits, "btd,vd->btv", x, table)


def test_embed_adds_up_the_gradients_of_a_row():
    module = Embed(4, 2, "vocab", normal(1.0))
    ids = jnp.array([[1, 1, 3]])
    params = nn.meta.unbox(module.init(jax.random.key(0), ids)["params"])
    weights = jnp.array([[1.0, 10.0, 100.0]])[..., None]
    grads = jax.grad(lambda p: (module.apply({"params": p}, ids) * weights).sum())(params)
    np.testing.assert_array_equal(grads["embedding"][:, 0], [0, 11, 0, 100])


def test_embed_computes_the_head_in_its_dtype_and_looks_up_in_float32(rng):
    module = Embed(7, 4, "vocab", normal(1.0), jnp.bfloat16)
    params = {"embedding": jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)}
    rows = module.apply({"params": params}, jnp.array([[2]]))
    np.testing.assert_array_equal(rows[0, 0], params["embedding"][2])
    x = jnp.asarray(rng.normal(size=(1, 3, 4)), jnp.float32)
    logits = module.apply({"params": params}, x, method=Embed.attend)
    assert logits.dtype == jnp.float32
    assert_product(logits, "btd,vd->btv", rounded(x), rounded(params["embedding"]))


@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
def test_layer_norm_equals_torch(rng, epsilon):
    size = 64
    x = (rng.normal(size=(3, 5, size)) * [[[0.01]], [[1.0]], [[30.0]]] + 3).astype(np.float32)
    x[0, 0] = 7.0  # a row without variance
    grad = rng.normal(size=x.shape).astype(np.float32)
    scale, bias = rng.normal(size=(2, size)).astype(np.float32)
    theirs = torch.nn.LayerNorm(size, epsilon).double()
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        theirs.bias.copy_(torch.tensor(bias))
    inputs = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    expected = theirs(inputs)
    expected.backward(torch.tensor(grad, dtype=torch.float64))

    module = LayerNorm(epsilon)
    y, pull = jax.vjp(
        lambda params, x: module.apply({"params": params}, x), {"scale": scale, "bias": bias}, x
    )
    params_grad, x_grad = pull(jnp.asarray(grad))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y[0, 0], bias, rtol=0, atol=1e-6)
    np.testing.assert_allclose(y[1:], expected.detach()[1:], rtol=0, atol=3e-6)
    np.testing.assert_allclose(params_grad["bias"], theirs.bias.grad, rtol=0, atol=3e-6)
    # A spread of 0.01 around 3 leaves float32 four digits fewer.
    np.testing.assert_allclose(y[0], expected.detach()[0], rtol=0, atol=3e-4)
    assert np.isfinite(x_grad).all()
    for row in (1, 2):
        exact = inputs.grad[row].numpy()
        np.testing.assert_allclose(x_grad[row], exact, rtol=0, atol=3e-6 * abs(exact).max())


def test_layer_norm_is_float32_for_bfloat16(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 16)), jnp.bfloat16)
    params = {"scale": jnp.ones(16), "bias": jnp.zeros(16)}
    y = LayerNorm(1e-5).apply({"params": params}, x)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(
        y, LayerNorm(1e-5).apply({"params": params}, x.astype(jnp.float32))
    )
