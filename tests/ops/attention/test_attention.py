"""ops/attention: every kernel against a float64 softmax, and the mask that they share."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.errors import NeoError
from neo_jax.ops import attention
from neo_jax.ops.attention import KERNELS, Mask, attend, blocked, choose, cudnn, dense, splash
from neo_jax.ops.int8 import rounded

IMPLEMENTATIONS = {
    "dense": dense,
    # Blocks so small that a short sequence has several, the last one ragged.
    "blocked": functools.partial(blocked, block_size=8),
    "blocked-5": functools.partial(blocked, block_size=5),
    "splash": functools.partial(splash, interpret=True),
    "cudnn": functools.partial(cudnn, implementation="xla"),
}
WITH_STARTS = [name for name in IMPLEMENTATIONS if name != "cudnn"]


@pytest.fixture(params=IMPLEMENTATIONS)
def kernel(request):
    return lambda q, k, v, mask: run(IMPLEMENTATIONS[request.param], mask, q, k, v)


@pytest.fixture(params=WITH_STARTS)
def padded_kernel(request):
    """One that can be told of padding."""
    return lambda q, k, v, mask: run(IMPLEMENTATIONS[request.param], mask, q, k, v)


def run(kernel, mask, *qkv):
    return jax.jit(lambda *qkv: kernel(*qkv, mask))(*qkv)


def run_with_gradients(kernel, mask, grad, *qkv):
    @jax.jit
    def both(*qkv):
        y, pull = jax.vjp(lambda *qkv: kernel(*qkv, mask), *qkv)
        return y, *pull(grad)

    return both(*qkv)


def sequence(positions, window=None):
    """The mask of rows that attend to themselves; where there is padding it says so."""
    positions = jnp.asarray(positions)
    segment_starts = jnp.zeros_like(positions) if (positions < 0).any() else None
    return Mask(positions, positions, window, aligned=True, segment_starts=segment_starts)


def draw(rng, *sizes, dtype=jnp.float32):
    """Queries, keys and values, [B, N, T, H]."""
    return tuple(jnp.asarray(rng.normal(size=sizes), dtype) for _ in range(3))


def visible(q_positions, k_positions, window):
    """The rule of the mask, a key at a time."""
    return np.array(
        [
            [[0 <= k <= q and (window is None or k > q - window) for k in ks] for q in qs]
            for qs, ks in zip(np.asarray(q_positions), np.asarray(k_positions), strict=True)
        ]
    )


def plain(q, k, v, seen):
    """softmax(q k^T) v in float64, no scale; `seen` is [B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.where(seen[:, None], q @ k.swapaxes(2, 3), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 17), st.just(8)),
    window=st.one_of(st.none(), st.integers(1, 20)),
    block_size=st.integers(1, 20),
)
@settings(max_examples=12)
def test_blocked_equals_dense_and_so_do_its_gradients(sizes, window, block_size):
    rng = np.random.default_rng(0)
    mask = sequence(np.broadcast_to(np.arange(sizes[2]), (sizes[0], sizes[2])), window)
    grad, qkv = jnp.asarray(rng.normal(size=sizes), jnp.float32), draw(rng, *sizes)
    expected = run_with_gradients(dense, mask, grad, *qkv)
    ours = run_with_gradients(functools.partial(blocked, block_size=block_size), mask, grad, *qkv)
    # Gradients of logits are differences of such products, which may cancel to almost nothing.
    products = np.abs(grad) @ np.abs(qkv[2]).swapaxes(2, 3)
    for mine, oracle in zip(ours, expected, strict=True):
        rounding = 2**-22 * products.max() * max(np.abs(x).max() for x in qkv)
        np.testing.assert_allclose(
            mine, oracle, rtol=0, atol=max(2e-6 * float(abs(oracle).max()), rounding)
        )


@pytest.mark.parametrize("window", [None, 1, 5])
def test_equals_softmax_without_scale(rng, kernel, window):
    q, k, v = draw(rng, 2, 3, 19, 64)
    q /= 4  # logits of standard deviation 2: a stray factor of 1/8 would show
    positions = np.broadcast_to(np.arange(19), (2, 19))
    expected = plain(q, k, v, visible(positions, positions, window))
    y = kernel(q, k, v, sequence(positions, window))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 8, 17, None])
def test_a_query_sees_exactly_its_window(kernel, window):
    """With equal logits and one-hot values, the output is the row of weights."""
    length = 17
    q = k = jnp.zeros((1, 1, length, length))
    v = jnp.eye(length)[None, None]
    weights = np.asarray(kernel(q, k, v, sequence(jnp.arange(length)[None], window)))[0, 0]
    for query, row in enumerate(weights):
        count = min(query + 1, window or length)
        assert np.flatnonzero(row).tolist() == list(range(query - count + 1, query + 1))
        np.testing.assert_allclose(row[row > 0], 1 / count, rtol=1e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(rng, padded_kernel, side, window):
    """A padded row equals the row alone, whatever lies under the padding."""
    length, pad = 13, 6
    qkv = draw(rng, 1, 2, length, 8)
    alone = padded_kernel(*qkv, sequence(jnp.arange(length)[None], window))
    before, after = (pad, 0) if side == "left" else (0, pad)
    padded = [
        jnp.pad(x, ((0, 0), (0, 0), (before, after), (0, 0)), constant_values=100.0) for x in qkv
    ]
    positions = np.pad(np.arange(length), (before, after), constant_values=-1)[None]
    y = padded_kernel(*padded, sequence(positions, window))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:, :, before : before + length], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WITH_STARTS)
def test_a_query_that_sees_nothing_is_finite(rng, name, dtype):
    qkv = draw(rng, 2, 2, 9, 8, dtype=dtype)
    positions = jnp.stack([jnp.full(9, -1), jnp.maximum(jnp.arange(9) - 4, -1)])
    grad = jnp.ones(qkv[0].shape)
    for array in run_with_gradients(IMPLEMENTATIONS[name], sequence(positions, 3), grad, *qkv):
        assert np.isfinite(np.asarray(array, np.float32)).all()


def test_rows_are_independent(rng, padded_kernel):
    q, k, v = draw(rng, 2, 2, 11, 8)
    positions = jnp.array([list(range(11)), [-1] * 3 + list(range(8))])
    y = padded_kernel(q, k, v, sequence(positions, 5))
    other = [x.at[1].multiply(-3.0) for x in (q, k, v)]
    np.testing.assert_array_equal(padded_kernel(*other, sequence(positions, 5))[0], y[0])


def test_bfloat16_is_float32_up_to_its_operands(rng, padded_kernel):
    """The weights are rounded to bfloat16 and nothing else: logits, softmax, sums are float32."""
    q, k, v = draw(rng, 2, 2, 12, 8, dtype=jnp.bfloat16)
    positions = np.array([[-1] * 4 + list(range(8)), list(range(12))])
    y = padded_kernel(q, k, v, sequence(positions, 5))
    assert y.dtype == jnp.float32
    assert np.isfinite(y).all()
    seen = visible(positions, positions, 5)
    seen[0, :4] = True  # these see nothing and are not compared
    difference = np.abs(np.asarray(y, np.float64) - plain(q, k, v, seen))
    allowed = 2**-8 * plain(q, k, jnp.abs(v), seen) + 1e-6
    assert (difference <= allowed)[:, :, 4:].all()
    assert (difference <= allowed)[1].all()


@given(
    positions=st.lists(st.integers(-1, 9), min_size=12, max_size=12),
    window=st.one_of(st.none(), st.integers(1, 12)),
)
@settings(max_examples=30)
def test_the_mask_is_its_rule(positions, window):
    """Positions in any order, as the slots of a cache hold them."""
    q_positions, k_positions = jnp.array([positions[:4]]), jnp.array([positions[4:]])
    mask = Mask(q_positions, k_positions, window)
    np.testing.assert_array_equal(mask.visible(), visible(q_positions, k_positions, window))
    segment_starts = jnp.array([positions[2:6]])
    started = Mask(q_positions, k_positions, window, segment_starts=segment_starts)
    np.testing.assert_array_equal(
        started.visible(), mask.visible() & (k_positions[:, None] >= segment_starts[:, :, None])
    )
    for whole in (mask, started):
        part = whole.block(slice(1, 3), slice(2, 7))
        np.testing.assert_array_equal(part.visible(), whole.visible()[:, 1:3, 2:7])
        assert not part.aligned


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("name", WITH_STARTS)
def test_a_query_sees_nothing_before_its_start(rng, name, window):
    """A row of documents equals each of them in a row of its own, in value and gradient."""
    kernel = IMPLEMENTATIONS[name]
    cuts = [0, 1, 9, 12, 19]  # within blocks and across them
    qkv = draw(rng, 1, 2, 19, 8)
    segment_starts = jnp.asarray(np.repeat(cuts[:-1], np.diff(cuts))[None])
    positions = jnp.arange(19)[None]
    grad = jnp.asarray(rng.normal(size=(1, 2, 19, 8)), jnp.float32)
    mask = Mask(positions, positions, window, aligned=True, segment_starts=segment_starts)
    together = run_with_gradients(kernel, mask, grad, *qkv)
    spans = list(itertools.pairwise(cuts))

    def apart(x):  # zeros behind each, which add nothing to a gradient
        rows = [jnp.pad(x[0, :, a:b], ((0, 0), (0, 19 - b + a), (0, 0))) for a, b in spans]
        return jnp.stack(rows)

    own = sequence(jnp.broadcast_to(positions, (len(spans), 19)), window)
    alone = run_with_gradients(kernel, own, apart(grad), *map(apart, qkv))
    for ours, theirs in zip(together, alone, strict=True):
        for row, (a, b) in enumerate(spans):
            np.testing.assert_allclose(ours[0, :, a:b], theirs[row, :, : b - a], atol=5e-6)


def test_dense_over_a_cache(rng):
    """Keys lie in any order, some slots are empty, and there are more of them than queries."""
    q, _, _ = draw(rng, 2, 2, 3, 8)
    k, v, _ = draw(rng, 2, 2, 7, 8)
    q_positions = jnp.array([[4, 5, 6], [2, 3, -1]])
    k_positions = jnp.array([[5, 6, 0, 1, 2, 3, 4], [-1, 3, -1, 2, 1, 0, -1]])
    seen = visible(q_positions, k_positions, 3)
    seen[1, 2] = True
    y = attend(q, k, v, Mask(q_positions, k_positions, 3))
    expected = plain(q, k, v, seen)
    np.testing.assert_allclose(y[0], expected[0], rtol=0, atol=2e-6)
    np.testing.assert_allclose(y[1, :, :2], expected[1, :, :2], rtol=0, atol=2e-6)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 8, 64, 257])
def test_every_bfloat16_product_of_a_step_runs(rng, batch, length):
    """Not every order of operands does on a CPU, and XLA folds what lies around attention."""
    mask = sequence(np.broadcast_to(np.arange(length), (batch, length)), 100)
    sizes = (batch, length, 2, 16)
    qkv, grad = draw(rng, *sizes, dtype=jnp.bfloat16), jnp.ones(sizes)

    def transposed(kernel):
        return lambda *qkv: kernel(*(x.swapaxes(1, 2) for x in qkv[:3]), mask).swapaxes(1, 2)

    ours, oracle = (
        run_with_gradients(lambda *x, k=k: transposed(k)(*x), mask, grad, *qkv)
        for k in (blocked, dense)
    )
    largest = max(np.abs(np.asarray(x, np.float32)).max() for x in (*qkv, *oracle))
    for mine, expected in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2**-6 * largest)


CPU, TPU = (types.SimpleNamespace(platform=platform) for platform in ("cpu", "tpu"))
V3, V5P = (types.SimpleNamespace(platform="tpu", device_kind=kind) for kind in ("TPU v3", "TPU v5"))
T4, A100, H200 = (
    types.SimpleNamespace(platform="gpu", compute_capability=version)
    for version in ("7.5", "8.0", "9.0")
)
AMD = types.SimpleNamespace(platform="gpu", compute_capability="gfx90a")


def asked(dtype=jnp.bfloat16, head_dim=64, aligned=True, segment_starts=False):
    """Queries, and the mask of their sequence."""
    positions = jnp.arange(6)[None]
    mask = Mask(
        positions, positions, 3, aligned, jnp.zeros_like(positions) if segment_starts else None
    )
    return jnp.zeros((1, 2, 6, head_dim), dtype), mask


@pytest.mark.parametrize(
    ("device", "options", "chosen"),
    [
        (CPU, {}, "blocked"),
        (CPU, {"dtype": jnp.float32}, "blocked"),
        (CPU, {"aligned": False}, "dense"),
        (TPU, {}, "splash"),
        (V3, {}, "blocked"),
        (V5P, {}, "splash"),
        (TPU, {"segment_starts": True}, "splash"),
        (TPU, {"head_dim": 16}, "splash"),
        (TPU, {"dtype": jnp.float32}, "blocked"),
        (TPU, {"aligned": False}, "dense"),
        (A100, {}, "cudnn"),
        (H200, {"head_dim": 128}, "cudnn"),
        (A100, {"dtype": jnp.float16}, "cudnn"),
        (A100, {"dtype": jnp.float32}, "blocked"),
        (A100, {"segment_starts": True}, "blocked"),
        (A100, {"head_dim": 4}, "blocked"),
        (A100, {"head_dim": 136}, "blocked"),
        (A100, {"aligned": False}, "dense"),
        (T4, {}, "blocked"),
        (T4, {"dtype": jnp.float16}, "blocked"),
        (AMD, {}, "blocked"),
    ],
)
def test_auto_takes_the_fastest_that_can(device, options, chosen):
    q, mask = asked(**options)
    assert choose("auto", q, mask, device) == chosen
    if chosen in attention.OF_DEVICE.values():
        assert choose(chosen, q, mask, device) == chosen


@pytest.mark.parametrize(
    ("kernel", "device", "options", "message"),
    [
        ("splash", CPU, {}, "'splash' kernel runs on TPUs, not on a CPU; use 'blocked'"),
        ("splash", A100, {}, "'splash' kernel runs on TPUs, not on a GPU; use 'blocked'"),
        ("splash-256", V3, {}, "TPUs from v4 on, not on a TPU v3; use 'blocked'"),
        ("splash", TPU, {"dtype": jnp.float32}, "in bfloat16, not in float32; use 'blocked'"),
        ("splash", TPU, {"aligned": False}, "a sequence that attends to itself; use 'dense'"),
        ("cudnn", CPU, {}, "capability 8.0 or newer; use 'blocked'"),
        ("cudnn", T4, {}, "capability 8.0 or newer; use 'blocked'"),
        ("cudnn", TPU, {}, "capability 8.0 or newer; use 'blocked'"),
        ("cudnn", A100, {"segment_starts": True}, "neither documents within a row nor padding"),
        ("cudnn", A100, {"dtype": jnp.float32}, "bfloat16 or float16, not in float32"),
        ("cudnn", A100, {"head_dim": 12}, "up to 128, a multiple of 8, not of 12"),
        ("cudnn", A100, {"aligned": False}, "a sequence that attends to itself; use 'dense'"),
    ],
)
def test_what_a_kernel_cannot_do_is_said(kernel, device, options, message):
    with pytest.raises(NeoError, match=message):
        choose(kernel, *asked(**options), device)


def test_attend_runs_what_is_chosen(rng, monkeypatch):
    calls = []
    for name in KERNELS:
        run_and_tell = lambda *args, name=name: (calls.append(name), dense(*args))[1]  # noqa: E731
        monkeypatch.setitem(attention.KERNELS, name, run_and_tell)
    positions = jnp.arange(6)[None]
    for kernel, aligned in itertools.product(("auto", "dense", "blocked"), (True, False)):
        if aligned or kernel != "blocked":
            attend(*draw(rng, 1, 1, 6, 4), Mask(positions, positions, 5, aligned), kernel)
    assert calls == ["blocked", "dense", "dense", "dense", "blocked"]


@pytest.mark.parametrize("length", [1, 2, 7])
def test_cudnn_is_given_even_lengths(rng, monkeypatch, length):
    """It has no gradient of odd ones."""
    lengths, attention = [], jax.nn.dot_product_attention

    def record(q, k, v, **options):
        lengths.append({x.shape[1] for x in (q, k, v)})
        return attention(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    q, k, v = draw(rng, 1, 2, length, 8)
    mask = sequence([list(range(length))])
    assert IMPLEMENTATIONS["cudnn"](q, k, v, mask).shape == q.shape
    assert lengths == [{length + length % 2}]


def test_blocked_refuses_a_cache(rng):
    positions = jnp.arange(5)[None]
    with pytest.raises(NeoError, match=r"'blocked' kernel serves a sequence .* use 'dense'"):
        attend(*draw(rng, 1, 1, 5, 4), Mask(positions, positions), "blocked")


def test_an_unknown_kernel_is_named(rng, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(NeoError, match=r"kernel 'denes'\. Did you mean 'dense'\?"):
        attend(*draw(rng, 1, 1, 5, 4), sequence(jnp.arange(5)[None]), "denes")


def test_shapes_are_checked(rng):
    q, k, v = draw(rng, 1, 1, 5, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match=r"parameter 'v'"):
        attend(q, k, v[:, :, :4], sequence(jnp.arange(5)[None]))


def test_dense_reads_int8_keys_and_values(rng):
    """As it reads the floats that they stand for."""
    q, k, v = (jnp.asarray(rng.normal(size=(2, 3, n, 8)), jnp.float32) for n in (4, 9, 9))
    mask = Mask(jnp.broadcast_to(jnp.arange(5, 9), (2, 4)), jnp.broadcast_to(jnp.arange(9), (2, 9)))
    k, v = rounded(k, 1), rounded(v, 1)
    expected = dense(q, k.dequantized(), v.dequantized(), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), expected, rtol=0, atol=2e-6)
