"""model/transformer.py: its parameters, what reaches what, padding, and decoding with a cache.

Equality with transformers is tested in test_parity.py.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from neo_jax.config import ModelConfig, preset
from neo_jax.model.cache import SLACK, from_sequence
from neo_jax.model.declared import logical_axes, param_shapes
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import attention

SMALL = ModelConfig(
    num_layers=1,
    embed_dim=16,
    num_heads=2,
    vocab_size=24,
    max_length=24,
    attention_types=("global",),
)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, tokens, positions=None, cache=None):
    return model.apply({"params": params}, tokens, positions, cache)


def assert_close(logits, expected):
    """Equal to 1e-5 of the logits' standard deviation."""
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.std(expected))


@pytest.fixture
def blocks(monkeypatch):
    """Makes short sequences long enough for several blocks."""
    monkeypatch.setitem(
        attention.KERNELS, "blocked", functools.partial(attention.blocked, block_size=5)
    )


@pytest.mark.parametrize(
    "config",
    [
        preset("gpt-neo-125m"),
        preset("gpt-neo-2.7b"),
        dataclasses.replace(SMALL, num_layers=3, mlp_dim=40, attention_types=["local"]),
        dataclasses.replace(
            SMALL,
            num_layers=6,
            num_heads=1,
            head_dim=16,
            attention_types=["global"] * 2 + ["local"],
        ),
    ],
)
def test_the_parameters_are_the_name_table(config):
    model = Neo(config, jnp.bfloat16)
    shapes = flatten_dict(jax.eval_shape(functools.partial(init_params, model), jax.random.key(0)))
    table = {row.path: row for row in tensors(config)}
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: row.shape for path, row in table.items()
    }
    assert {leaf.dtype for leaf in shapes.values()} == {jnp.dtype(jnp.float32)}
    assert flatten_dict(param_shapes(model)) == shapes
    axes = flatten_dict(logical_axes(model))
    assert axes == {path: row.axes for path, row in table.items()}


def test_initialisation_is_that_of_mesh_tensorflow():
    config = ModelConfig(
        num_layers=4, embed_dim=256, num_heads=4, vocab_size=300, max_length=200, mlp_dim=512
    )
    params = jax.jit(functools.partial(init_params, Neo(config)))(jax.random.key(0))
    width, head_dim = 256, 64
    stddev = {
        "wte": 0.02,
        "wpe": 0.01,
        "q_proj": (width * head_dim) ** -0.5,
        "k_proj": width**-0.5,
        "v_proj": width**-0.5,
        "out_proj": width**-0.5,
        "c_fc": 0.02,
        "c_proj": 0.02 / 4**0.5,
    }
    kernels = {}
    leaves = flatten_dict(params)
    table = leaves["wte", "embedding"]
    assert table.shape == (384, 256)  # a multiple of 128
    assert not table[300:].any()
    leaves["wte", "embedding"] = table[:300]
    for path, leaf in leaves.items():
        if path[-1] == "bias":
            assert not leaf.any(), path
        elif path[-1] == "scale":
            assert (leaf == 1).all(), path
        else:
            kernels[path] = np.asarray(leaf, np.float64).flatten()
            np.testing.assert_allclose(kernels[path].std(), stddev[path[-2]], rtol=0.02)
            # Of a normal distribution: 4.55 % lie beyond two standard deviations.
            beyond = np.mean(np.abs(kernels[path]) > 2 * stddev[path[-2]])
            assert 0.035 < beyond < 0.056, path
            assert abs(kernels[path].mean()) < 0.03 * stddev[path[-2]], path
    for first, second in zip(kernels, list(kernels)[1:], strict=False):
        a, b = kernels[first][:4096], kernels[second][:4096]
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.08, (first, second)


def reach(config):
    """Which input positions (columns) each output position (rows) depends on."""
    distance = np.subtract.outer(np.arange(config.max_length), np.arange(config.max_length))
    reached = np.eye(config.max_length, dtype=int)
    for layer in range(config.num_layers):
        window = config.window(layer) or config.max_length
        reached = ((distance >= 0) & (distance < window)).astype(int) @ reached
    return reached > 0


@pytest.mark.parametrize("kernel", ["dense", "blocked"])
@pytest.mark.parametrize(
    ("types", "window", "widest"),
    [
        ("l", 5, 5),
        ("l", 1, 1),
        ("lll", 4, 3 * (4 - 1) + 1),
        ("g", 4, 24),
        ("gl", 4, 24),
    ],
)
@pytest.mark.usefixtures("blocks")
def test_gradients_reach_what_attention_sees_and_nothing_else(types, window, widest, kernel):
    names = {"g": "global", "l": "local"}
    config = dataclasses.replace(
        SMALL,
        num_layers=len(types),
        window_size=window,
        attention_types=[names[letter] for letter in types],
    )
    model = Neo(config, kernel=kernel)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    tokens = jnp.arange(24)[None]
    readout = jnp.cos(jnp.arange(24.0))

    def outputs(embedding):
        changed = params | {"wpe": {"embedding": embedding}}
        return model.apply({"params": changed}, tokens).logits[0] @ readout

    # Position s enters through row s of this table and nowhere else.
    jacobian = jax.jit(jax.jacrev(outputs))(params["wpe"]["embedding"])
    depends = np.asarray(jacobian != 0).any(axis=-1)
    np.testing.assert_array_equal(depends, reach(config))
    assert depends[-1].sum() == widest


@pytest.mark.parametrize("kernel", ["dense", "blocked"])
@pytest.mark.usefixtures("blocks")
def test_padding_does_not_change_a_row(tiny, kernel):
    """Right padding with positions that run on or are -1, and left padding by positions."""
    model = dataclasses.replace(tiny[0], kernel=kernel)
    lengths, width = [27, 1, 19], 27
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 96, (1, length)) for length in lengths]
    # Not `apply`, whose compiled programs outlive the patched block size.
    forward = jax.jit(lambda params, *args: model.apply({"params": params}, *args).logits)
    alone = [forward(tiny[1], row)[0] for row in rows]

    def padded(left, fill):
        tokens = rng.integers(0, 96, (3, width))  # whatever lies under the padding
        positions = np.full((3, width), -1) if fill else np.tile(np.arange(width), (3, 1))
        places = []
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(width - length, width) if left else slice(0, length)
            tokens[i, place], positions[i, place] = row[0], np.arange(length)
            places.append(place)
        logits = forward(tiny[1], tokens, positions)
        assert np.isfinite(logits).all()
        return [logits[i, place] for i, place in enumerate(places)]

    for left, fill in ((False, False), (False, True), (True, True)):
        for mine, expected in zip(padded(left, fill), alone, strict=True):
            assert_close(mine, expected)


LENGTH = 56  # beyond twice the slots of a local layer
AROUND_THE_WRAP = [1, 7, 8, 9, 8 + SLACK - 1, 8 + SLACK, 8 + SLACK + 1, 39]


@pytest.fixture(scope="module")
def texts(tiny):
    """A text for each prompt length, and the logits of the whole texts."""
    tokens = np.random.default_rng(3).integers(0, 96, (len(AROUND_THE_WRAP), LENGTH))
    return tokens, np.asarray(apply(*tiny, tokens).logits)


@pytest.mark.parametrize("step", [1, 2, 5, SLACK + 1])
def test_prefill_and_steps_equal_the_whole(tiny, texts, step):
    """Rows of different lengths share a batch; each appends `step` tokens at a time."""
    model, params = tiny
    tokens, expected = texts
    lengths = np.array(AROUND_THE_WRAP)
    prefill = apply(model, params, tokens[:, : lengths.max()])
    for row, length in enumerate(lengths):
        assert_close(prefill.logits[row, :length], expected[row, :length])
    cache = from_sequence(model.config, prefill.cache, jnp.asarray(lengths), LENGTH)
    rows = np.arange(len(lengths))[:, None]
    while (lengths < LENGTH).any():
        positions = lengths[:, None] + np.arange(step)
        positions = np.where(positions < LENGTH, positions, -1)  # rows end at different times
        output = apply(model, params, tokens[rows, positions], positions, cache)
        real = positions >= 0
        assert np.isfinite(output.logits).all()
        assert_close(output.logits[real], expected[rows, positions][real])
        cache, lengths = output.cache, np.minimum(lengths + step, LENGTH)


def test_prefill_without_padding_and_a_cache_that_just_fits(tiny, texts):
    model, params = tiny
    tokens, expected = (x[:2] for x in texts)
    for length, room in ((9, 10), (30, 56)):
        prefill = apply(model, params, tokens[:, :length])
        cache = from_sequence(model.config, prefill.cache, jnp.full(2, length), room)
        positions = jnp.full((2, 1), length)
        output = apply(model, params, tokens[:, length : length + 1], positions, cache)
        assert_close(output.logits[:, 0], expected[:, length])


def test_a_cache_may_begin_empty(tiny, texts):
    """The whole text through the cache, no prefill: rows at different speeds."""
    model, params = tiny
    tokens, expected = (x[:2] for x in texts)
    whole = apply(model, params, tokens[:, :1]).cache
    cache = from_sequence(model.config, whole, jnp.zeros(2, int), LENGTH)
    lengths = np.zeros(2, int)
    for step in range(12):
        counts = np.array([4, 1 + 3 * (step % 2)])
        positions = lengths[:, None] + np.arange(4)
        positions = np.where(np.arange(4) < counts[:, None], positions, -1)
        output = apply(model, params, tokens[[[0], [1]], positions], positions, cache)
        real = positions >= 0
        assert_close(output.logits[real], expected[[[0], [1]], positions][real])
        cache, lengths = output.cache, lengths + counts


def test_encode_and_unembed_are_the_two_halves(tiny):
    model, params = tiny
    tokens = jnp.arange(12).reshape(2, 6)
    whole = model.apply({"params": params}, tokens)
    x, cache = model.apply({"params": params}, tokens, method=Neo.hidden)
    np.testing.assert_array_equal(x, whole.hidden_states[-1])
    logits = model.apply({"params": params}, x, method=Neo.unembed)
    assert logits.shape == (2, 6, 128)
    assert whole.logits.shape == (2, 6, 96)
    np.testing.assert_array_equal(logits[..., :96], whole.logits)
    assert (logits[..., 96:] == -np.inf).all()
    assert len(whole.hidden_states) == model.config.num_layers + 1
    assert len(cache) == model.config.num_layers
    assert cache[1].k.shape == (2, 2, 6, 16)


@pytest.mark.parametrize("kernel", ["dense", "blocked"])
@pytest.mark.parametrize("types", [("global",), ("local",), ("local", "global")])
def test_what_is_asked_is_what_the_whole_has_there(types, kernel):
    """In any order and twice, of rows with and without padding; the cache is that of all tokens."""
    config = dataclasses.replace(
        SMALL, num_layers=2, attention_types=types, max_length=32, window_size=8
    )
    model = Neo(config, kernel=kernel)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 30), 0, 24)
    positions = jnp.stack([jnp.arange(30), jnp.r_[jnp.full(9, -1), jnp.arange(21)]])
    query_indices = jnp.array([[29, 0, 17, 17], [12, 29, 9, 10]])
    encode = functools.partial(model.apply, {"params": params}, method=Neo.hidden)
    for places in (None, positions):
        whole, cache = encode(tokens, places)
        some, cache_too = encode(tokens, places, query_indices=query_indices)
        assert_close(some, whole[jnp.arange(2)[:, None], query_indices])
        jax.tree.map(np.testing.assert_array_equal, cache_too, cache)


def test_bfloat16_is_close_to_float32_and_finite_with_padding(tiny):
    model, params = tiny
    half = dataclasses.replace(model, dtype=jnp.bfloat16)
    tokens = np.random.default_rng(1).integers(0, 96, (3, 40))
    positions = np.stack([np.arange(40), np.arange(40) - 25, np.full(40, -1)]).clip(-1)
    real = positions >= 0
    expected = np.asarray(apply(model, params, tokens, positions).logits)
    output = apply(half, params, tokens, positions)
    assert output.logits.dtype == jnp.float32
    assert {x.dtype for x in output.hidden_states} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for layer in output.cache for x in layer[:2]} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(output.logits).all()
    error = np.asarray(output.logits) - expected
    assert 1e-4 < error[real].std() / expected[real].std() < 0.05


@pytest.mark.parametrize(
    ("tokens", "positions"),
    [
        (jnp.zeros(4, int), None),
        (jnp.zeros((1, 4)), None),
        (jnp.zeros((1, 4), int), jnp.zeros((1, 3), int)),
        (jnp.zeros((2, 4), int), jnp.zeros((1, 4), int)),
    ],
)
def test_shapes_and_dtypes_are_checked(tiny, tokens, positions):
    model, params = tiny
    with pytest.raises(jaxtyping.TypeCheckError):
        model.apply({"params": params}, tokens, positions)
