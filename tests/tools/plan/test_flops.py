"""Products of a trace: those of true kernels are not in it, and follow by arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from neo_jax.config import ModelConfig
from neo_jax.model.layers import einsum
from neo_jax.tools.plan.flops import traced_flops
from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.hlo_cost import work
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler

CONFIG = ModelConfig(embed_dim=512, num_heads=4, attention_types=("global",), num_layers=1)
ROWS, LENGTH = 2, 1024
PAIRS = ROWS * 4 * LENGTH * (LENGTH + 1) / 2


@pytest.mark.parametrize(("fused", "products"), [(False, 2 + 3 + 4), (True, 2 + 5)])
def test_the_splash_kernel(fused, products):
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.CausalMask((LENGTH,) * 2)] * 4
    )
    sizes = dict.fromkeys(("block_q_dq", "block_kv_dq"), None if fused else 256)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=256, block_kv=256, block_kv_compute=256, block_q_dkv=256, block_kv_dkv=256,
        block_kv_dkv_compute=256, use_fused_bwd_kernel=fused, **sizes,
    )  # fmt: skip
    attend = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=blocks)

    def loss(q, k, v):
        return jax.vmap(attend)(q, k, v).astype(jnp.float32).sum()

    place = jax.sharding.SingleDeviceSharding(find_topology("v5e:1x1").devices[0])
    q = jax.ShapeDtypeStruct((ROWS, 4, LENGTH, 128), jnp.bfloat16, sharding=place)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, q, q)
    kernels = products * 2 * 128 * PAIRS
    outside = 2 * ROWS * 4 * LENGTH * 128  # of the output and its gradient, row by row
    assert traced_flops(traced, CONFIG) == kernels + outside
    program = parse(traced.lower().compile().as_text())
    # The compiler makes sums of elementwise products of it.
    assert work(program, CONFIG).flops in (kernels, kernels + outside)


@pytest.mark.core
def test_loops_branches_and_shards():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.P("data")

    def body(x):
        x = jax.lax.scan(lambda x, _: (x @ x, None), x, length=5)[0]
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    sharded = jax.shard_map(body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    traced = jax.jit(sharded).trace(jnp.zeros((8 * 16, 16)))
    assert traced_flops(traced, CONFIG) == 8 * (5 + 2) * 2 * 16**3


def test_what_nothing_needs_does_not_count():
    """Frozen weights get no gradient, though the backward pass of a product gives it."""
    weight = jnp.zeros((48, 32))

    def loss(x):
        def layer(x, w):
            return einsum("btd,ed->bte", x, w, jnp.float32), None

        x, _ = jax.lax.scan(layer, x, weight[None, :32])
        return jnp.sin(einsum("btd,fd->btf", x, weight, jnp.float32)).sum()

    traced = jax.jit(jax.grad(loss)).trace(jnp.zeros((2, 8, 32)))
    assert traced_flops(traced, CONFIG) == 2 * 2 * 16 * 32 * (32 + 48)
