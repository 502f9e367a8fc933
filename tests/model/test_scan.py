"""model/scan.py: the same numbers as the canonical form, by a program of constant size."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax.config import ModelConfig
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.scan import embed, hidden, stack, stacked_axes, unstack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops.attention import blocked

UNIT = ModelConfig(
    num_layers=6, embed_dim=32, num_heads=2, vocab_size=96, max_length=64, window_size=8
)
PATTERNS = {
    "pairs": dataclasses.replace(UNIT, num_layers=4),
    "one kind": dataclasses.replace(UNIT, num_layers=3, attention_types=("local",)),
    "triples": dataclasses.replace(UNIT, attention_types=("global", "local", "local")),
    "no repetition": dataclasses.replace(
        UNIT, num_layers=3, attention_types=("global", "global", "local")
    ),
}


def run_stacked(model, params, tokens, segment_starts=None, key=None, **options):
    x = embed(model, params, tokens, segment_starts, key)
    return hidden(model, params, x, segment_starts, key=key, **options)


@pytest.fixture(params=PATTERNS)
def some(request):
    model = Neo(PATTERNS[request.param])
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 24), np.int32))
    return model, params, tokens


def test_stacking_and_back(some):
    model, params, _ = some
    stacked = stack(params, model.config)
    unit = len(model.config.attention_types)
    assert set(stacked) == {"wte", "wpe", "ln_f", *(f"unit_{i}" for i in range(unit))}
    back = flatten_dict(unstack(stacked, model.config))
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(back.pop(path), leaf)
    assert not back
    axes = flatten_dict(stacked_axes(model))
    canonical = flatten_dict(logical_axes(model))
    for path, leaf in flatten_dict(stacked).items():
        assert len(axes[path]) == leaf.ndim
        if path[0].startswith("unit_"):
            assert axes[path] == ("layers", *canonical["h_0", *path[1:]])


@pytest.mark.parametrize(
    ("some", "remat"),
    [*((name, "none") for name in PATTERNS), ("pairs", "full"), ("triples", "products")],
    indirect=["some"],
)
def test_the_numbers_are_the_canonical_ones(some, remat):
    model, params, tokens = some

    def stacked_sum(params):
        x = run_stacked(model, stack(params, model.config), tokens, remat=remat)
        return jnp.sum(jnp.sin(x)), x

    def canonical_sum(params):
        x, _ = model.apply({"params": params}, tokens, method=Neo.hidden)
        return jnp.sum(jnp.sin(x)), x

    (_, ours), our_grads = jax.jit(jax.value_and_grad(stacked_sum, has_aux=True))(params)
    (_, theirs), their_grads = jax.jit(jax.value_and_grad(canonical_sum, has_aux=True))(params)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    for ours, theirs in zip(jax.tree.leaves(our_grads), jax.tree.leaves(their_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(("kernel", "remat"), [("dense", "none"), ("blocked", "full")])
def test_documents_of_a_row_are_as_if_alone(kernel, remat, monkeypatch):
    """Hidden states, and gradients: attention ends, and positions begin, at each document."""
    monkeypatch.setattr(blocked, "__defaults__", (8,))  # so that a row has several blocks
    model = Neo(dataclasses.replace(UNIT, num_layers=2), kernel=kernel)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    params = stack(jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params), model.config)
    cuts = [0, 3, 4, 20, 24]
    tokens = np.random.default_rng(0).integers(0, 96, (1, 24), np.int32)
    segment_starts = np.repeat(cuts[:-1], np.diff(cuts))[None].astype(np.int32)
    apart = np.zeros((4, 24), np.int32)
    counts = np.zeros((4, 24), bool)
    for row, (start, stop) in enumerate(itertools.pairwise(cuts)):
        apart[row, : stop - start] = tokens[0, start:stop]
        counts[row, : stop - start] = True

    @jax.jit
    def run(params, tokens, counts, segment_starts=None):
        def total(params):
            x = run_stacked(model, params, tokens, segment_starts, remat=remat)
            return jnp.sum(jnp.where(counts[..., None], jnp.sin(x), 0)), x

        return jax.value_and_grad(total, has_aux=True)(params)

    (_, ours), our_grads = run(params, tokens, np.ones((1, 24), bool), segment_starts)
    (_, alone), their_grads = run(params, apart, counts)
    np.testing.assert_allclose(ours[0], alone[counts], rtol=0, atol=1e-5)
    for a, b in zip(jax.tree.leaves(our_grads), jax.tree.leaves(their_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())
    # The documents do see each other where nothing is said.
    (_, across), _ = run(params, tokens, np.ones((1, 24), bool))
    assert np.abs(across[0, :3] - ours[0, :3]).max() < 1e-5 < np.abs(across - ours).max()


def compiled(num_layers, remat):
    model = Neo(dataclasses.replace(UNIT, num_layers=num_layers))
    params = jax.eval_shape(
        lambda key: stack(init_params(model, key), model.config), jax.random.key(0)
    )
    tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    gradient = jax.grad(
        lambda params, tokens: run_stacked(model, params, tokens, remat=remat).sum()
    )
    return jax.jit(gradient).lower(params, tokens).compile()


def test_the_program_does_not_grow_with_the_depth():
    sizes = [len(compiled(n, "none").as_text()) for n in (4, 24)]
    assert sizes[1] < 1.1 * sizes[0]


def test_rematerialisation_saves_memory():
    none, products, full = (
        compiled(16, remat).memory_analysis().temp_size_in_bytes
        for remat in ("none", "products", "full")
    )
    assert full < 0.7 * products < 0.7 * none


def test_every_layer_drops_something_else():
    """What one layer alone adds, a constant, shows what it drops: others drop another half."""
    model = Neo(dataclasses.replace(UNIT, num_layers=4), dropout=0.5)
    shapes = param_shapes(model)
    zeros = flatten_dict(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes))
    zeros["ln_f", "scale"] += 1
    tokens = jnp.zeros((1, 64), jnp.int32)

    @jax.jit
    def run(params):
        return run_stacked(model, stack(params, model.config), tokens, key=jax.random.key(0))

    kept = []
    for i in range(4):
        bias = (f"h_{i}", "mlp", "c_proj", "bias")
        params = zeros | {bias: zeros[bias] + 1}
        kept.append(np.asarray(run(unflatten_dict(params))) > 0)
    for one, other in itertools.combinations(kept, 2):
        assert abs((one == other).mean() - 0.5) < 0.05


def test_dropout():
    model = Neo(dataclasses.replace(UNIT, num_layers=4), dropout=0.5)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    stacked = stack(params, model.config)
    tokens = jnp.zeros((1, 64), jnp.int32)
    run = jax.jit(lambda key, remat: run_stacked(model, stacked, tokens, remat=remat, key=key),
                  static_argnums=1)  # fmt: skip
    a, b, again = (run(jax.random.key(seed), "none") for seed in (0, 1, 0))
    assert jnp.abs(a - b).max() > 0.1
    np.testing.assert_array_equal(a, again)
    # The backward pass of a rematerialised layer draws what the forward pass drew.
    grads = [
        jax.jit(jax.grad(lambda p, r=remat: jnp.sum(run_stacked(
            model, p, tokens, remat=r, key=jax.random.key(0)) ** 3)))(stacked)
        for remat in ("none", "full")
    ]  # fmt: skip
    for ours, theirs in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    # Without a key nothing is dropped, and what is kept is scaled up: the mean stays.
    whole = model.apply({"params": params}, tokens, method=Neo.embed)[0]
    kept = model.apply(
        {"params": params}, tokens, method=Neo.embed, rngs={"dropout": jax.random.key(0)}
    )[0]
    dropped = np.asarray(kept == 0)
    assert abs(dropped.mean() - 0.5) < 0.05
    np.testing.assert_allclose(kept[~dropped], 2 * whole[~dropped], rtol=1e-6)
    plain = model.clone(dropout=0.0)
    np.testing.assert_array_equal(
        run_stacked(model, stacked, tokens),
        run_stacked(plain, stacked, tokens, key=jax.random.key(0)),
    )
