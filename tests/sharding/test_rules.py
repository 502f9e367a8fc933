"""sharding/rules.py: its little language, its errors, and models spread over eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from neo_jax.errors import NeoError
from neo_jax.model.declared import logical_axes
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.sharding.fsdp import gather
from neo_jax.sharding.rules import (
    STRATEGIES,
    constrain,
    make_sharding,
    padded_rows,
    tree_shardings,
)


def test_no_mesh_is_no_sharding():
    assert make_sharding() is None


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=8", {"data": 8}),
        ("data=2,fsdp=4", {"data": 2, "fsdp": 4}),
        ("fsdp=4, model=2", {"fsdp": 4, "model": 2}),
        ("fsdp=-1", {"fsdp": 8}),
        ("data=2,fsdp=-1,model=2", {"data": 2, "fsdp": 2, "model": 2}),
        ("data=8,model=-1", {"data": 8, "model": 1}),
    ],
)
def test_meshes(text, sizes):
    sharding = make_sharding(text)
    assert dict(sharding.mesh.shape) == sizes
    assert sharding.mesh.devices.flatten().tolist() == jax.devices()
    assert hash(sharding) == hash(make_sharding(text))
    assert sharding == make_sharding(text)


@pytest.mark.parametrize(("text", "size"), [("model=2", 2), ("data=3,fsdp=2", 6), ("fsdp=1", 1)])
def test_a_smaller_mesh_of_fixed_sizes_takes_the_first_devices(monkeypatch, text, size):
    assert make_sharding(text).mesh.devices.flatten().tolist() == jax.devices()[:size]
    for devices in (jax.devices(), 8):  # told, it is to be all of them
        with pytest.raises(NeoError, match=f"asks for {size} devices, but 8 are here"):
            make_sharding(text, devices=devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(NeoError, match=f"asks for {size} devices, but 8 are here"):
        make_sharding(text)


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("data=2,fsdp=2,model=2", "batch:data+fsdp embed:fsdp heads:model mlp:model vocab:model"),
        ("data=8", "batch:data"),
        ("fsdp=8", "batch:fsdp embed:fsdp"),
        ("model=8", "heads:model mlp:model vocab:model"),
    ],
)
def test_default_rules_are_those_that_the_mesh_has(text, rules):
    assert written(make_sharding(text)) == rules


@pytest.mark.parametrize(
    ("name", "mesh", "rules"),
    [
        ("data", "data=8", "batch:data"),
        ("fsdp", "fsdp=8", "batch:fsdp embed:fsdp"),
        ("tensor", "model=8", "heads:model mlp:model vocab:model"),
        (
            "fsdp+tensor",
            "fsdp=4,model=2",
            "batch:fsdp embed:fsdp heads:model mlp:model vocab:model",
        ),
        (
            "context",
            "context=8",
            "length:context embed:context",
        ),
        ("decode", "model=8", "heads:model mlp:model vocab:model"),
    ],
)
def test_a_strategy_by_its_name_alone(name, mesh, rules):
    assert make_sharding(rules=name) == make_sharding(mesh, name)
    assert written(make_sharding(rules=name)) == rules


@pytest.mark.parametrize(
    ("name", "mesh", "rules"),
    [
        ("data", "data=4,fsdp=2", "batch:data+fsdp"),
        ("fsdp", "data=2,fsdp=4", "batch:data+fsdp embed:fsdp"),
        ("tensor", "data=2,fsdp=2,model=2", "batch:data+fsdp heads:model mlp:model vocab:model"),
        (
            "context",
            "fsdp=2,context=4",
            "batch:fsdp length:context embed:fsdp+context",
        ),
        (
            "decode",
            "data=2,context=2,model=2",
            "batch:data heads:model mlp:model vocab:model length:context kv_length:context",
        ),
        (
            "decode",
            "data=2,fsdp=2,model=2",
            "batch:data embed:fsdp heads:model mlp:model vocab:model",
        ),
    ],
)
def test_a_strategy_uses_the_axes_that_it_is_given(name, mesh, rules):
    assert written(make_sharding(mesh, name)) == rules


def written(sharding):
    return " ".join(f"{axis}:{'+'.join(names)}" for axis, names in sharding.rules)


def test_every_strategy_is_tested():
    assert list(STRATEGIES) == ["data", "fsdp", "tensor", "fsdp+tensor", "context", "decode"]


def test_rules_replace_the_defaults():
    sharding = make_sharding("data=2,model=4", "batch:data, vocab:data+model")
    assert written(sharding) == "batch:data vocab:data+model"
    assert written(make_sharding("data=2,fsdp=4", "vocab:fsdp")) == "batch:data+fsdp vocab:fsdp"
    assert sharding.spec(("vocab", "embed"), (16, 3)) == PartitionSpec(("data", "model"), None)
    assert sharding.spec(("batch", None, "heads"), (4, 5, 3)) == PartitionSpec("data", None, None)


@pytest.mark.parametrize(
    ("mesh", "rules", "message"),
    [
        ("", "embed:fsdp", "--rules needs a mesh; add for example --mesh fsdp=-1"),
        ("fspd=8", "", r"unknown mesh axis 'fspd' in 'fspd=8'\. Did you mean 'fsdp'\?"),
        ("data=8,", "", "unknown mesh axis '' in 'data=8,'"),
        ("data", "", "mesh axis 'data' needs a size, as in 'data=2'"),
        ("data=x", "", "mesh axis 'data=x' needs a size"),
        ("data=0", "", "mesh axis 'data=0' needs a size"),
        ("data=-2", "", "mesh axis 'data=-2' needs a size"),
        ("data=--1", "", "mesh axis 'data=--1' needs a size"),
        ("data=²", "", "mesh axis 'data=²' needs a size"),
        ("data=2,data=8", "", "'data=2,data=8' names the axis 'data' twice"),
        ("data=-1,fsdp=-1", "", "more than one -1"),
        ("data=9", "", "asks for 9 devices, but 8 are here; one size may be -1"),
        ("data=3,fsdp=-1", "", "asks for 6 devices, but 8 are here"),
        ("data=16,fsdp=-1", "", "asks for 16 devices, but 8 are here"),
        ("data=8", "embd:data", r"unknown logical axis 'embd' in the rules\. Did you mean 'embed'"),
        ("data=8", "embed:fsdp", r"rule 'embed:fsdp' names no axis of the mesh\. Known are: data"),
        ("data=8", "embed", r"no strategy is called 'embed'\. Known are: context, data, decode,"),
        ("", "fspd", r"no strategy is called 'fspd'\. Did you mean 'fsdp'\?"),
        ("data=8", "fsdp", "strategy 'fsdp' needs the mesh axis 'fsdp'; write .* --mesh fsdp=-1"),
        ("fsdp=8", "fsdp+tensor", "needs the mesh axis 'model'; write .* --mesh fsdp=-1,model=2"),
        ("fsdp=8", "decode", "strategy 'decode' needs the mesh axis 'model'"),
        ("data=8", "embed:data,", "unknown logical axis '' in the rules"),
        ("data=8", "layers:data", "unknown logical axis 'layers' in the rules"),
        ("data=8", "embed:", "rule 'embed:' names no axis of the mesh"),
        (
            "data=2,model=4",
            "data",
            "by the rules 'data' the 4 devices of mesh axis 'model' in 'data=2,model=4' would "
            "split nothing; give 'model' a rule, or leave it out",
        ),
        ("fsdp=2,model=4", "batch:fsdp", "the 4 devices of mesh axis 'model' .* split nothing"),
        ("context=8", "", "by the default rules the 8 devices of mesh axis 'context'"),
        ("data=8", "embed:data+", r"rule 'embed:data\+' names no axis of the mesh"),
        ("data=8", "embed:data,embed:data", "the rules name the axis 'embed' twice"),
    ],
)
def test_errors_name_the_mend(mesh, rules, message):
    with pytest.raises(NeoError, match=message):
        make_sharding(mesh, rules)


def test_a_batch_may_stay_whole():
    sharding = make_sharding("fsdp=8", "batch:,embed:fsdp")
    assert written(sharding) == "embed:fsdp"
    assert sharding.num_shards("batch") == 1


def test_a_default_for_loaded_models():
    sharding = make_sharding("data=2,fsdp=4", default="decode")
    assert written(sharding) == "batch:data embed:fsdp"


def test_an_indivisible_size_names_tensor_axis_and_sizes():
    sharding = make_sharding("fsdp=4,model=2")
    with pytest.raises(NeoError, match=r"^h_0/k: axis 'embed' of size 6 .* over 4 devices of fsdp"):
        sharding.spec(("embed", "heads"), (6, 2), "h_0/k")
    both = make_sharding("data=2,fsdp=4")
    with pytest.raises(NeoError, match=r"'batch' of size 12 .* data\+fsdp; choose a multiple of 8"):
        both.spec(("batch",), (12,))
    split = make_sharding("context=8", "length:context")
    with pytest.raises(NeoError, match=r"'length' of size 12 .* choose a multiple of 8, or drop"):
        split.spec(("length",), (12,))


def test_a_mesh_axis_splits_an_array_once():
    sharding = make_sharding("data=8", "embed:data,mlp:data")
    message = (
        r"^w: mesh axis 'data' of 8 devices would split both 'embed' of size 8 and 'mlp' of size "
        r"64; drop one of the two from the rules\.$"
    )
    with pytest.raises(NeoError, match=message):
        sharding.spec(("embed", "mlp"), (8, 64), "w")
    twice = make_sharding("data=8", "embed:data+data")
    with pytest.raises(NeoError, match="would split both 'embed' of size 64 and 'embed'"):
        twice.spec(("embed",), (64,))


def test_a_tree_names_its_leaf():
    sharding = make_sharding("model=8")
    shapes = {"h_0": {"kernel": jax.ShapeDtypeStruct((4, 12), jnp.float32)}}
    axes = {"h_0": {"kernel": ("embed", "heads")}}
    with pytest.raises(NeoError, match=r"^h_0/kernel: axis 'heads' of size 12 .* over 8 devices"):
        tree_shardings(sharding, axes, shapes)


def test_activations_lie_as_the_rules_say():
    sharding = make_sharding("data=4,model=2", "batch:data,vocab:model")
    lay = jax.jit(lambda x: constrain(sharding, x, ("batch", "length", "vocab"), "logits"))
    assert lay(jnp.ones((8, 3, 6))).sharding.spec == PartitionSpec("data", None, "model")
    with pytest.raises(NeoError, match=r"^logits: axis 'batch' of size 1 does not divide over 4"):
        lay(jnp.ones((1, 3, 6)))
    assert constrain(None, 3, ("batch",), "three") == 3


def test_what_the_compiler_may_place_stays_where_it_was():
    sharding = make_sharding("data=4,model=2", "batch:data,vocab:model")
    where = sharding.named(("batch", "vocab"), (8, 6))
    x = jax.device_put(np.ones((8, 6)), where)
    lay = jax.jit(lambda x: constrain(sharding, x, ("batch", ...), "x") * 2)
    assert lay(x).sharding.is_equivalent_to(where, 2)
    whole = jax.jit(lambda x: constrain(sharding, x, ("batch", None), "x") * 2)
    assert whole(x).sharding.is_equivalent_to(sharding.named(("batch", None), (8, 6)), 2)


def test_rows_fill_the_mesh():
    assert padded_rows(None, 3) == 3
    sharding = make_sharding("data=2,fsdp=4")
    assert [padded_rows(sharding, n) for n in (1, 8, 9)] == [8, 8, 16]
    assert padded_rows(make_sharding("model=8"), 3) == 3


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        ("fsdp+tensor", PartitionSpec(None, "model")),  # batch over fsdp: gathered
        ("decode", PartitionSpec("fsdp", "model")),  # batch not over fsdp: stays
    ],
)
def test_weights_are_gathered_where_the_batch_is_split(rules, spec):
    sharding = make_sharding("fsdp=4,model=2", rules)
    stored = sharding.named(("embed", "mlp"), (8, 16))
    weight = jax.device_put(np.ones((8, 16), np.float32), stored)

    def used(weight):
        return gather(sharding, weight, ("embed", "mlp"), "w")

    assert jax.jit(used)(weight).sharding.spec == spec
    gradient = jax.jit(jax.grad(lambda w: used(w).sum()))(weight)
    assert gradient.sharding.is_equivalent_to(stored, 2)


@pytest.fixture(scope="module")
def expected(tiny):
    model, params = tiny
    tokens = np.random.default_rng(0).integers(0, 96, (8, 20))
    return tokens, np.asarray(jax.jit(model.apply)({"params": params}, tokens).logits)


@pytest.mark.parametrize(
    ("mesh", "rules", "shards"),
    [
        (
            "fsdp=4,model=2",
            "",
            {
                "wte/embedding": (64, 8),
                "h_1/attn/q_proj/kernel": (1, 16, 8),
                "h_1/attn/out_proj/kernel": (8, 1, 16),
                "h_1/mlp/c_fc/kernel": (64, 8),
                "h_1/mlp/c_fc/bias": (64,),
                "ln_f/scale": (8,),
            },
        ),
        ("data=8", "", {"wte/embedding": (128, 32), "h_1/mlp/c_fc/kernel": (128, 32)}),
        # 20 tokens are padded to 24.
        ("context=8", "length:context,embed:context", {"wte/embedding": (128, 4)}),
        (
            "data=2,model=4",
            "batch:data,vocab:model,mlp:model,positions:data,head_dim:model",
            {
                "wte/embedding": (32, 32),
                "wpe/embedding": (32, 32),
                "h_1/attn/q_proj/kernel": (2, 4, 32),
                "h_1/mlp/c_proj/kernel": (32, 32),
            },
        ),
    ],
)
def test_a_mesh_changes_where_and_not_what(tiny, expected, mesh, rules, shards):
    model, params = tiny
    tokens, logits = expected
    sharding = make_sharding(mesh, rules)
    spread = Neo(model.config, sharding=sharding)
    params = jax.device_put(params, tree_shardings(sharding, logical_axes(spread), params))
    leaves = {"/".join(path): leaf for path, leaf in flatten_dict(params).items()}
    for name, shape in shards.items():
        pieces = leaves[name].addressable_shards
        assert {piece.data.shape for piece in pieces} == {shape}
        assert len({piece.device for piece in pieces}) == 8
        distinct = {str(piece.index) for piece in pieces}
        assert len(distinct) * np.prod(shape) == leaves[name].size

    forward = jax.jit(spread.apply)
    ours = forward({"params": params}, tokens).logits
    rows = {piece.data.shape[0] for piece in ours.addressable_shards}
    assert rows == {8 // sharding.mesh.shape.get("data", 1) // sharding.mesh.shape.get("fsdp", 1)}
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * logits.std())


def test_parameters_are_drawn_where_they_lie(tiny):
    """The same values as on one device, without a copy of the whole on any."""
    model, params = tiny
    sharding = make_sharding("fsdp=4,model=2")
    spread = Neo(model.config, sharding=sharding)
    shardings = tree_shardings(sharding, logical_axes(spread), params)
    drawn = jax.jit(lambda key: init_params(spread, key), out_shardings=shardings)(
        jax.random.key(0)
    )
    table = {row.path: row for row in tensors(model.config)}
    for path, leaf in flatten_dict(drawn).items():
        assert leaf.sharding.spec == sharding.spec(table[path].axes, table[path].shape)
        np.testing.assert_allclose(leaf, flatten_dict(params)[path], rtol=1e-6, atol=1e-9)
