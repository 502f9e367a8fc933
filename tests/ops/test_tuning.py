"""Which way a loop is compiled, by device and by what the device's compiler knows."""

import jax
import jax.numpy as jnp
import pytest

from neo_jax.model.transformer import Neo
from neo_jax.ops import tuning
from neo_jax.ops.tuning import Loop
from neo_jax.sharding.rules import make_sharding
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler


def test_elsewhere_a_loop_is_the_function_jitted(tiny):
    loop = Loop(lambda model, x: model.config.num_layers * x, static_argnums=0)
    assert loop(tiny[0], jnp.float32(2)) == 8
    assert loop.on(tiny[0]) is loop._plain


@pytest.mark.parametrize("known", [True, False])
def test_a_tpus_compiler_is_told_what_it_knows(tiny, monkeypatch, known):
    """An option of another release of libtpu must not keep anyone from decoding."""
    if not known:
        monkeypatch.setattr(tuning, "TPU_OPTIONS", {"xla_tpu_not_of_this_release": 1.0})
    tuning.takes_options.cache_clear()
    devices = find_topology("v5e:2x2").devices
    sharding = make_sharding("model=4", "tensor", devices=devices)
    model = Neo(tiny[0].config, sharding=sharding)
    loop = Loop(lambda model, x: x + 1, static_argnums=0)
    assert loop.on(model) is (loop._with_options if known else loop._plain)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.named((), ()))
    loop.on(model).lower(model, number).compile()  # which refuses what it does not know
    tuning.takes_options.cache_clear()


def test_sizes_are_chosen_by_device():
    tpus = make_sharding("model=4", "tensor", devices=find_topology("v5e:2x2").devices)
    assert (tuning.loss_tokens(None), tuning.loss_tokens(tpus)) == (512, 4096)
    assert (tuning.forward_tokens(None), tuning.forward_tokens(tpus)) == (1024, 8192)
    assert [tuning.unroll(None, 6, remat) for remat in ("none", "products", "full")] == [6, 1, 1]
    assert tuning.unroll(tpus, 6, "none") == 1
