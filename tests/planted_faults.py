"""Ten small programs, each with a fault of sharding in the line that ends in "# fault".

Each function of `FAULTS` returns a function and its arguments, for a mesh of data=4 and model=2.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import with_sharding_constraint as constrain
from jax.sharding import Mesh, NamedSharding, PartitionSpec

FAULTS = {}


def fault(rule):
    """Registers a program with the rule that finds its fault."""

    def register(program):
        FAULTS[program.__name__] = (program, rule)
        return program

    return register


def make_mesh(devices):
    """The mesh of all programs."""
    return Mesh(np.array(devices[:8]).reshape(4, 2), ("data", "model"))


def place(mesh, *axes):
    """A sharding."""
    return NamedSharding(mesh, PartitionSpec(*axes))


def array(mesh, shape, *axes, dtype=jnp.float32):
    """An argument that need not be there."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=place(mesh, *axes))


@fault("narrower")
def rounded_after_it_was_gathered(mesh):
    def layer(w, x):
        w = constrain(w, place(mesh, None, "model"))
        x = x.astype(jnp.bfloat16)
        return x @ w.astype(jnp.bfloat16)  # fault

    return layer, array(mesh, (256, 512), "data", "model"), array(mesh, (64, 256), "data")


@fault("narrower")
def widened_before_it_is_gathered(mesh):
    def layer(w, x):
        x = jnp.tanh(x)
        return x @ constrain(w.astype(jnp.float32), place(mesh, None, "model"))  # fault

    weights = array(mesh, (256, 512), "data", "model", dtype=jnp.bfloat16)
    return layer, weights, array(mesh, (64, 256), "data")


@fault("constraint")
def constraints_that_disagree(mesh):
    def layer(w, x):
        h = constrain(x @ w, place(mesh, "data", "model"))
        h = constrain(jnp.tanh(h), place(mesh, "model", "data"))  # fault
        return 2 * h

    return layer, array(mesh, (256, 512), None, "model"), array(mesh, (64, 256), "data")


@fault("constraint")
def no_constraint(mesh):
    def step(w1, w2, x):
        def loss(w1, w2):
            h = jax.nn.gelu(x @ w1)  # fault
            return jnp.mean((h @ w2) ** 2)

        g1, g2 = jax.grad(loss, (0, 1))(w1, w2)
        return w1 - g1, w2 - g2

    w1, w2 = array(mesh, (256, 512), "data", "model"), array(mesh, (512, 256), "model", "data")
    return step, w1, w2, array(mesh, (64, 256), "data")


@fault("indivisible")
def a_vocabulary_that_does_not_divide(mesh):
    def logprobs(w, x):
        logits = constrain(x @ w, place(mesh, "data", "model"))  # fault
        logits = jax.nn.log_softmax(logits)
        return constrain(logits, place(mesh, "data"))

    return logprobs, array(mesh, (256, 1001)), array(mesh, (64, 256), "data")


@fault("whole")
def a_parameter_that_is_not_split(mesh):
    def step(params, x, y):
        def loss(params):
            h = jnp.tanh(x @ params["w1"])  # fault
            return jnp.mean((h @ params["w2"] - y) ** 2)

        gradients = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    params = {"w1": array(mesh, (256, 512)), "w2": array(mesh, (512, 16))}
    return step, params, array(mesh, (64, 256), "data"), array(mesh, (64, 16), "data")


@fault("along")
def a_table_that_is_split_by_rows(mesh):
    def embed(table, ids):
        rows = jnp.take(table, ids, axis=0)  # fault
        return jnp.tanh(rows)

    return embed, array(mesh, (1024, 64), "model"), array(mesh, (64, 32), "data", dtype=jnp.int32)


@fault("along")
def heads_that_do_not_divide(mesh):
    def attend(x):
        h = jnp.swapaxes(x.reshape(64, 32, 3, 32), 1, 2)  # fault
        return jnp.einsum("bhqd,bhkd->bhqk", h, h)

    return attend, array(mesh, (64, 32, 96), "data", None, "model")


@fault("along")
def the_largest_along_a_split_axis(mesh):
    def best(logits):
        logits = logits / 0.7
        return jax.lax.top_k(logits, 5)  # fault

    return best, array(mesh, (64, 1024), "data", "model")


@fault("every_trip")
def summed_in_every_trip(mesh):
    def step(w, parts):
        def body(total, x):
            return total + jax.grad(lambda w: jnp.mean((x @ w) ** 2))(w), None  # fault

        return w - jax.lax.scan(body, jnp.zeros_like(w), parts)[0]

    return step, array(mesh, (256, 256)), array(mesh, (8, 64, 256), None, "data")
