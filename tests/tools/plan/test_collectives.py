"""What a program sends: text made by hand, every line of which can be checked by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from neo_jax.tools.plan.collectives import Traffic, _groups, collectives, traffic
from neo_jax.tools.plan.hlo import parse

TEXT = (Path(__file__).parent / "program.hlo").read_text()
MESH = {"fsdp": 4, "model": 2}


def test_every_collective_is_counted_once_for_each_time_that_it_runs():
    assert collectives(parse(TEXT), MESH, open_trips=1) == [
        # Three trips around five.
        Traffic("collective-permute", ("model",), 15, 15 * 100 * 4),
        # Two links of a chain are one gather, of bfloat16.
        Traffic("all-gather", ("fsdp",), 3, 3 * (1024 * 8 * 2 * 3 // 4)),
        # An all-reduce by its name, a reduce-scatter by the fusion that it is in.
        Traffic("reduce-scatter", ("fsdp",), 3, 3 * (64 * 32 * 4 * 3 // 4)),
        # Two tensors in one, among 4 of 8 devices: 0, 2, 4, 6 and 1, 3, 5, 7.
        Traffic("all-reduce", ("fsdp",), 1, 2 * (16 * 4 + 16 * 2) * 3 // 4),
        Traffic("all-gather", ("model",), 1, 20 * 4 // 2),
        Traffic("reduce-scatter", ("model",), 1, 32 * 4 // 2),
        Traffic("collective-permute", ("fsdp",), 1, 6 * 4),
        Traffic("all-to-all", ("fsdp",), 1, 24 * 4 * 3 // 4),
        Traffic("collective-permute", (), 1, 0),
        # All branches count.
        Traffic("all-reduce", ("fsdp", "model"), 1, 2 * 10 * 4 * 7 // 8),
        Traffic("all-gather", ("fsdp",), 1, 12 * 4 // 2),
        Traffic("all-reduce", ("fsdp", "model"), 1, 2 * 1 * 7 // 8),
    ]


def test_traffic_is_the_sum_by_kind_and_axes():
    rows = traffic(parse(TEXT), MESH, open_trips=10)
    assert rows[0] == Traffic("all-gather", ("fsdp",), 4, 3 * 12288 + 24)
    assert rows[1] == Traffic("reduce-scatter", ("fsdp",), 3, 3 * 6144)
    assert Traffic("all-reduce", ("fsdp", "model"), 11, 70 + 10) in rows
    assert [row.wire_bytes for row in rows] == sorted((r.wire_bytes for r in rows), reverse=True)


def test_a_loop_of_unknown_length_needs_to_be_told():
    with pytest.raises(ValueError, match="any is in a loop of unknown length; set open_trips"):
        collectives(parse(TEXT), MESH)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=4,'b'=2,'c'=1] {'b'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'b','a'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(0,3,1,2) {'b'}", [[0, 3], [1, 2]]),
        ("mesh['a'=8] {'a':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(4)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=4,'b'=2] {'a':(2)2,'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ],
)
def test_groups_in_every_form(text, groups):
    assert _groups(f", channel_id=1, replica_groups={text}, to_apply=%add", 8).tolist() == groups


def test_a_program_that_was_compiled_here():
    """Each of JAX's own collectives, in a loop of five, over eight devices."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows = jax.P(("fsdp", "model"))

    def body(x, _):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)  # [32, 6]
        scattered = jax.lax.psum_scatter(jnp.sin(gathered), "fsdp", tiled=True)
        summed = jax.lax.psum(jnp.cos(scattered), "model")
        moved = jax.lax.ppermute(jnp.tan(summed), "fsdp", [(0, 1), (1, 2), (2, 3), (3, 0)])
        swapped = jax.lax.all_to_all(jnp.exp(moved), "model", 0, 0, tiled=True)
        return swapped, None

    def run(x):
        return jax.lax.scan(body, x, length=5)[0]

    run = jax.shard_map(run, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    text = jax.jit(run).lower(jnp.zeros((64, 6))).compile().as_text()
    shard = 8 * 6 * 4
    assert set(traffic(parse(text), mesh.shape)) == {
        Traffic("all-gather", ("fsdp",), 5, 5 * 3 * shard),
        Traffic("reduce-scatter", ("fsdp",), 5, 5 * 3 * shard),
        Traffic("all-reduce", ("model",), 5, 5 * shard),
        Traffic("collective-permute", ("fsdp",), 5, 5 * shard),
        Traffic("all-to-all", ("model",), 5, 5 * shard // 2),
    }


NETWORK = """
ENTRY %main (p: f32[64]) -> f32[64] {
  %p = f32[64]{0:T(128)} parameter(0)
  %token = token[] after-all()
  %send = (f32[64]{0:T(128)}, u32[], token[]) send(%p, %token), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[64]{0:T(128)}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %near = f32[64]{0:T(128)} all-reduce(%p), channel_id=3, replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""  # fmt: skip  # noqa: E501


def test_slices_send_by_their_hosts_and_number_their_own_devices():
    assert traffic(parse(NETWORK), {"data": 4, "fsdp": 2}, slices={"data": 2}) == [
        Traffic("all-reduce", ("data",), 1, 256, between_slices=True),
        Traffic("all-reduce", ("data",), 1, 256),
    ]
