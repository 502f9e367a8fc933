"""tools/layout_report.py: the table, the sums and the drawings of `info --mesh`."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from neo_jax.config import ModelConfig, preset
from neo_jax.errors import NeoError
from neo_jax.model.declared import logical_axes
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.rules import make_sharding, tree_shardings
from neo_jax.tools.layout_report import cache_leaves, describe, draw, lines, parameters

CONFIG = ModelConfig(
    num_layers=3,
    embed_dim=32,
    num_heads=4,
    vocab_size=100,
    max_length=64,
    window_size=8,
    attention_types=("global", "local", "local"),
)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=4,model=2", "data=2,fsdp=2,model=2"])
def test_sizes_are_what_a_device_really_holds(mesh):
    sharding = make_sharding(mesh)
    model = Neo(CONFIG, sharding=sharding)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    params = jax.device_put(params, tree_shardings(sharding, logical_axes(model), params))
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    fields = describe(CONFIG, sharding)
    assert fields["bytes_per_device"]["parameters_float32"] == on_one
    assert sum(part["bytes_per_device"] for part in fields["parameters"]) == on_one
    assert fields["bytes_per_device"]["optimizer_adamw_float32"] == 2 * on_one
    assert fields["bytes_per_device"]["parameters_bfloat16"] == on_one // 2
    assert sum(part.count for part in parameters(CONFIG, sharding)) == len(flatten_dict(params))


def test_cache_of_both_kinds_of_layer():
    sharding = make_sharding("fsdp=4,model=2")
    parts = {part.name: part for part in cache_leaves(CONFIG, sharding)}
    assert parts["global cache/k"].shape == [4, 4, 64, 8]
    assert parts["local cache/v"].shape == [4, 4, 8 + 16, 8]
    assert (parts["global cache/k"].count, parts["local cache/k"].count) == (1, 2)
    a_row_a_device = 2 * 2 * (64 + 2 * 24) * 4 * 8 // 2 + 4 * (64 + 2 * 24)
    assert describe(CONFIG, sharding)["bytes_per_device"]["cache_bfloat16"] == a_row_a_device


def test_activations_of_a_block():
    parts = describe(CONFIG, make_sharding("fsdp=4,model=2"))["activations"]
    found = {part["name"]: (part["shape"], part["split"]) for part in parts}
    rows, heads = ["fsdp"], ["model"]
    assert found == {
        "residual stream": ([4, 64, 32], [rows, [], []]),
        "queries": ([4, 4, 64, 8], [rows, heads, [], []]),
        "MLP hidden": ([4, 64, 128], [rows, [], heads]),
        "logits": ([4, 64, 128], [rows, [], heads]),
    }
    assert parts[2]["bytes_per_device"] == 4 * 64 * 64


def test_devices_that_are_not_there():
    sharding = make_sharding("data=16,fsdp=16", devices=256)
    fields = describe(preset("gpt-neo-13b"), sharding)
    assert fields["mesh"] == {"data": 16, "fsdp": 16}
    assert fields["rules"] == {"batch": ["data", "fsdp"], "embed": ["fsdp"]}
    table = next(part for part in fields["parameters"] if part["name"] == "wte/embedding")
    assert table == {
        "name": "wte/embedding",
        "count": 1,
        "axes": ["vocab", "embed"],
        "shape": [50304, 5120],
        "split": [[], ["fsdp"]],
        "bytes_per_device": 4 * 50304 * 320,
    }


def test_a_drawing_shows_who_holds_what():
    """The boxes hold the devices that JAX gives each part to."""
    sharding = make_sharding("data=2,fsdp=2,model=2")
    cuts = [("embed", ("fsdp",)), ("mlp", ("model",))]
    assert "\n".join(draw(cuts, sharding)) == (
        "         mlp over model\n"
        "       ┌─────┬─────┐\n"
        " embed │ 0 4 │ 1 5 │\n"
        "       ├─────┼─────┤\n"
        "  fsdp │ 2 6 │ 3 7 │\n"
        "       └─────┴─────┘"
    )
    places = sharding.named(("embed", "mlp"), (4, 4)).devices_indices_map((4, 4))
    by_part = {}
    for device, index in places.items():
        by_part.setdefault(tuple(part.start for part in index), set()).add(device.id)
    assert by_part == {(0, 0): {0, 4}, (0, 2): {1, 5}, (2, 0): {2, 6}, (2, 2): {3, 7}}


def test_an_axis_that_two_mesh_axes_split_and_nothing_else():
    sharding = make_sharding("fsdp=2,data=4", "batch:data+fsdp,embed:fsdp")
    drawn = "\n".join(draw([("batch", ("data", "fsdp"))], sharding))
    order = [int(word) for word in drawn.split() if word.isdigit()]
    rows = sharding.named(("batch",), (8,)).devices_indices_map((8,))
    expected = sorted(rows, key=lambda device: rows[device][0].start)
    assert order == [device.id for device in expected] == [0, 4, 1, 5, 2, 6, 3, 7]


def test_large_meshes_are_cut_short():
    sharding = make_sharding("data=32,fsdp=16,model=16", devices=8192)
    cuts = [("embed", ("fsdp",)), ("vocab", ("model",))]
    drawn = list(draw(cuts, sharding))
    assert max(map(len, drawn)) < 400
    assert len(drawn) == 2 + 2 * 8
    assert np.array([line.count("…") for line in drawn]).max() == 8


def test_the_lines_name_everything_once():
    text = "\n".join(lines(CONFIG, make_sharding("fsdp=4,model=2")))
    assert "mesh   fsdp=4, model=2\nrules  batch:fsdp, embed:fsdp, heads:model" in text
    assert "h_*/attn/q_proj/kernel    3 x heads 4/model x head_dim 8 x embed 32/fsdp" in text
    for part in parameters(CONFIG, make_sharding("fsdp=4,model=2")):
        assert len([line for line in text.splitlines() if line.startswith(f"{part.name} ")]) == 1
    whole = "\n".join(lines(CONFIG, make_sharding("data=8")))
    assert "\n  whole on every device" in whole


def test_what_cannot_be_split_is_an_error():
    with pytest.raises(NeoError, match=r"h_0/attn/q_proj/kernel: axis 'heads' of size 12 does not"):
        describe(preset("gpt-neo-125m"), make_sharding("model=8"))
    context = make_sharding("context=128", "kv_length:context", devices=128)
    with pytest.raises(NeoError, match=r"local cache/k: axis 'kv_length' of size 272 does not"):
        describe(preset("gpt-neo-125m"), context)
