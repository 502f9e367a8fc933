"""transforms/lora.py: adapters, where they go, and what they make of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.errors import NeoError
from neo_jax.model.low_rank import LowRank
from neo_jax.model.scan import embed, hidden, stack, stacked_axes, unstack
from neo_jax.transforms.lora import (
    LoraConfig,
    adapter_axes,
    add_adapters,
    init_adapters,
    merge,
    with_norms,
)

pytestmark = pytest.mark.optimized

ALL = LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "k_proj", "v_proj", "out_proj", "c_fc",
                                             "c_proj"))  # fmt: skip


def run_stacked(model, params, tokens, segment_starts=None, key=None, **options):
    x = embed(model, params, tokens, segment_starts, key)
    return hidden(model, params, x, segment_starts, key=key, **options)


@pytest.fixture(scope="module")
def adapted(tiny):
    """A tiny model, its stacked parameters, and adapters of every kernel that are not zero.

    Small ones: larger ones make a function whose gradients rounding changes in the fourth digit.
    """
    model, params = tiny
    adapters = init_adapters(model.config, ALL, jax.random.key(1))
    adapters = jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 16, adapters
    )
    return model, stack(params, model.config), adapters


def test_adapters_are_drawn_as_peft_draws_them(tiny_config):
    lora = LoraConfig(rank=8, targets=("v_proj", "c_proj"))
    leaves = flatten_dict(init_adapters(tiny_config, lora, jax.random.key(0)))
    layers = {f"unit_{i}/{path}/kernel" for i in range(2) for path in ("attn/v_proj", "mlp/c_proj")}
    assert {"/".join(path[:-1]) for path in leaves} == layers
    assert leaves["unit_1", "attn", "v_proj", "kernel", "b"].shape == (2, 2, 16, 8)
    a = leaves["unit_1", "mlp", "c_proj", "kernel", "a"]
    assert a.shape == (2, 8, 128)
    assert 0.95 * 128**-0.5 < float(jnp.abs(a).max()) <= 128**-0.5
    assert len(np.unique(a)) > 0.99 * a.size
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        assert bool(leaf.any()) == (path[-1] == "a")


def test_new_adapters_change_nothing(tiny):
    model, params = tiny
    stacked = stack(params, model.config)
    adapters = init_adapters(model.config, ALL, jax.random.key(1))
    tokens = jnp.arange(40).reshape(2, 20)
    run = jax.jit(lambda params: run_stacked(model, params, tokens))
    np.testing.assert_array_equal(run(add_adapters(stacked, adapters, ALL.scale)), run(stacked))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_merged_is_unmerged_with_its_gradients(adapted, remat):
    model, params, adapters = adapted
    tokens = jnp.arange(40).reshape(2, 20)

    def run(adapters, form):
        whole = form(add_adapters(params, adapters, ALL.scale))
        return jnp.sin(run_stacked(model, whole, tokens, remat=remat)).sum()

    results = [
        jax.jit(jax.value_and_grad(run), static_argnums=1)(adapters, form)
        for form in (merge, lambda whole: whole)
    ]
    for ours, theirs in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * scale)


def test_the_decoding_loop_takes_them(adapted):
    model, params, adapters = adapted
    whole = unstack(add_adapters(params, adapters, ALL.scale), model.config)
    assert isinstance(whole["h_3"]["mlp"]["c_fc"]["kernel"], LowRank)
    settings = make_settings(SamplingOptions(temperature=0), [0])
    texts = [
        engine.generate(model, tree, [[1, 2, 3]], 12, settings)[0].ids
        for tree in (whole, merge(whole), unstack(params, model.config))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_attaching_leaves_the_base_as_it_is(adapted):
    _, params, adapters = adapted
    whole = add_adapters(params, adapters, 0.5)
    assert not any(isinstance(leaf, LowRank) for leaf in flatten_dict(params).values())
    kernel = whole["unit_1"]["attn"]["out_proj"]["kernel"]
    assert kernel.weight is params["unit_1"]["attn"]["out_proj"]["kernel"]
    assert kernel.scale == 0.5
    assert whole["wte"] is params["wte"]


def test_axes_of_adapters(adapted):
    model, params, adapters = adapted
    axes = stacked_axes(model)
    assert adapter_axes(params, axes) == axes
    ours = adapter_axes(adapters, axes)["unit_0"]
    assert ours["attn"]["q_proj"]["kernel"] == {
        "a": ("layers", None, "embed"),
        "b": ("layers", "heads", "head_dim", None),
    }
    assert ours["attn"]["out_proj"]["kernel"] == {
        "a": ("layers", None, "heads", "head_dim"),
        "b": ("layers", "embed", None),
    }


def test_the_scale_is_alpha_by_rank():
    assert LoraConfig(rank=8, alpha=16.0).scale == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"targets": ("q_proj", "c_attn")},
            "lora.targets: no kernel is called 'c_attn'; choose from q_proj, k_proj, v_proj, "
            "out_proj, c_fc, c_proj.",
        ),
        ({"targets": ()}, "lora.targets is empty; name some of q_proj, k_proj, "),
        ({"rank": -1}, "lora.rank must be 0 (off) or more, not -1."),
    ],
)
def test_configs_that_cannot_be(fields, message):
    with pytest.raises(NeoError) as error:
        dataclasses.replace(LoraConfig(), **fields)
    assert str(error.value).startswith(message)


def test_outputs_get_the_norms_that_they_are_given(rng):
    """DoRA (Liu et al., 2024): directions stay, and an output of zeros does."""
    kernel = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    kernel[1, 2] = 0
    norms = rng.uniform(1, 2, (2, 3)).astype(np.float32)
    found = np.asarray(with_norms(kernel, norms))
    sizes = np.linalg.norm(kernel.reshape(2, 3, -1), axis=-1)
    expected = kernel / np.where(sizes, sizes, 1)[..., None, None] * norms[..., None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
