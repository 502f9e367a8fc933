"""What a program computes and moves, against what its arrays say."""

import jax
import jax.numpy as jnp
import pytest

from neo_jax.tools.plan.hlo import parse
from neo_jax.tools.plan.hlo_cost import work
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler

EQUATIONS = [
    ("ij,jk->ik", (64, 128), (128, 256)),
    ("bij,bjk->bik", (6, 64, 128), (6, 128, 32)),
    ("bnth,bnsh->bnts", (2, 3, 128, 64), (2, 3, 256, 64)),
    ("btd,dnh->btnh", (2, 64, 128), (128, 4, 32)),
    ("btf,btd->fd", (2, 64, 128), (2, 64, 256)),
]


def compiled(function, *shapes, topology="v5e:1x1", dtype=jnp.float32):
    place = jax.sharding.SingleDeviceSharding(find_topology(topology).devices[0])
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile()


def multiplications(equation, left, right):
    sizes = dict(zip(equation.replace(",", "").partition("->")[0], left + right, strict=True))
    product = 1
    for size in sizes.values():
        product *= size
    return product


@pytest.mark.parametrize("topology", ["cpu:1", "v5e:1x1"])
@pytest.mark.parametrize(("equation", "left", "right"), EQUATIONS)
def test_products_of_any_axes(topology, equation, left, right):
    """A TPU's compiler writes them as convolutions, whose window it moves along batch axes."""
    program = compiled(lambda x, y: jnp.einsum(equation, x, y), left, right, topology=topology)
    done = work(parse(program.as_text()))
    assert done.flops == 2 * multiplications(equation, left, right)


@pytest.mark.parametrize("topology", ["cpu:1", "v5e:1x1"])
def test_loops_count_as_often_as_they_run(topology):
    def run(x, y):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ y), None), x, length=7)[0]

    program = compiled(run, (512, 512), (512, 512), topology=topology)
    assert work(parse(program.as_text())).flops == 7 * 2 * 512**3


def test_memory_that_a_chain_of_products_moves():
    """As the compiler itself counts where nothing is in a loop."""

    def run(x, y):
        for _ in range(3):
            x = jnp.tanh(x @ y)
        return x

    program = compiled(run, (8192, 8192), (8192, 8192))
    ours = work(parse(program.as_text())).memory_bytes
    assert ours == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)


def test_a_loop_over_slices_reads_each_once():
    def run(x, weights):
        return jax.lax.scan(lambda x, weight: (jnp.tanh(x @ weight), None), x, weights)[0]

    program = compiled(run, (8, 4096), (6, 4096, 4096), dtype=jnp.bfloat16)
    weights = 6 * 2 * 4096**2
    assert weights <= work(parse(program.as_text())).memory_bytes <= 1.1 * weights


def test_a_loop_of_unknown_length():
    def run(x, y):
        return jax.lax.while_loop(lambda x: x.sum() < 0, lambda x: x @ x, x) @ y

    text = compiled(run, (64, 64), (64, 64)).as_text()
    assert work(parse(text), open_trips=3).flops == 4 * 2 * 64**3
    with pytest.raises(ValueError, match="in a loop of unknown length"):
        work(parse(text))


ASYNCHRONOUS = """
%slice (p: bf16[1024,768]) -> bf16[256,768] {
  %p = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %part = bf16[256,768]{1,0:T(8,128)(2,1)S(1)} slice(%p), slice={[256:512], [0:768]}
}

ENTRY %main (x: bf16[1024,768]) -> bf16[256,768] {
  %x = bf16[1024,768]{1,0:T(8,128)(2,1)} parameter(0)
  %start = ((bf16[1024,768]{1,0:T(8,128)(2,1)}), bf16[256,768]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}) async-start(%x), calls=%slice
  ROOT %done = bf16[256,768]{1,0:T(8,128)(2,1)S(1)} async-done(%start)
}
"""  # fmt: skip  # noqa: E501


OFFLOADED = """HloModule step

%looks_up (table: f32[512,96], ids: s32[64]) -> f32[64,96] {
  %ids = s32[64]{0:T(1024)} parameter(1)
  %table = f32[512,96]{1,0:T(8,128)} parameter(0)
  ROOT %rows = f32[64,96]{1,0:T(8,128)} gather(%table, %ids), offset_dims={1}
}

ENTRY %main (table: f32[512,96], ids: s32[64]) -> f32[64,96] {
  %table.1 = f32[512,96]{1,0:T(8,128)} parameter(0)
  %ids.1 = s32[64]{0:T(1024)} parameter(1)
  %start = ((), (), (s32[25]{0:T(1)S(11)}, s32[0]{0})) async-start(), async_execution_thread="sparsecore", calls=%looks_up
  ROOT %done = f32[64,96]{1,0:T(8,128)} async-done(%start), async_execution_thread="sparsecore"
}
"""  # fmt: skip  # noqa: E501


def test_what_a_sparse_core_does_is_told_by_what_it_calls():
    assert work(parse(OFFLOADED)).memory_bytes == 64 * 4 + 2 * 64 * 96 * 4


def test_a_slice_that_is_fetched_early_is_no_more_than_a_slice():
    assert work(parse(ASYNCHRONOUS)).memory_bytes == 256 * 768 * 2
