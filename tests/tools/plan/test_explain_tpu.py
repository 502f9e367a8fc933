"""Somebody else's net, as the compiler for TPUs compiles it."""

import jax
import jax.numpy as jnp
import planted_faults
import pytest
from flax import linen as nn

from neo_jax.tools.plan import explain
from neo_jax.tools.plan.topology import find_topology

pytestmark = [pytest.mark.tpu_compiler, pytest.mark.usefixtures("lines_of_this_checkout")]


class Mlp(nn.Module):
    """Two layers of Flax."""

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(1024, use_bias=False, name="up")(x))
        return nn.Dense(256, use_bias=False, name="down")(h)


def test_a_net_of_flax_for_a_tpu():
    mesh = planted_faults.make_mesh(find_topology("v5e:2x4").devices)
    params = {
        "up": {"kernel": planted_faults.array(mesh, (256, 1024), "data", "model")},
        "down": {"kernel": planted_faults.array(mesh, (1024, 256), "model", "data")},
    }
    x = planted_faults.array(mesh, (512, 256), "data")

    def step(params, x):
        def loss(params):
            out = Mlp().apply({"params": jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)}, x)
            return jnp.mean(out.astype(jnp.float32) ** 2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params))

    found = explain(jax.jit(step, donate_argnums=0).lower(params, x).compile())
    rows = {(row.kind, row.name): row for row in found.moved}
    for layer in ("up", "down"):
        gathered = rows["all-gather", f"params['{layer}']['kernel']"]
        assert gathered.axes == ("data",)
        reduced = rows["reduce-scatter", f"gradient of params['{layer}']['kernel']"]
        frame = reduced.origin.line
        assert frame.file == __file__  # and not Flax's
        with open(frame.file) as file:
            assert f'name="{layer}"' in file.read().splitlines()[frame.line - 1]
    assert found.peak.total == pytest.approx(found.expected, rel=0.1)
