"""The TPU kernel, run step by step on a CPU: against dense, and in the model on every mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.config import ModelConfig
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import attention
from neo_jax.ops.attention import Mask, context, dense, splash
from neo_jax.ops.attention.splash import block_size
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.objectives.next_token import Batch, NextToken

interpreted = functools.partial(splash, interpret=True)


@pytest.mark.parametrize(
    ("length", "window", "size"),
    [
        (2048, None, 512),
        (2048, 256, 256),
        (2048, 300, 256),
        (2048, 5, 128),
        (2048, 4096, 512),
        (768, None, 256),
        (640, None, 128),
        (640, 256, 128),
        (128, None, 128),
    ],
)
def test_blocks_divide_the_length_and_are_no_wider_than_the_window(length, window, size):
    assert block_size(length, window) == size


def logits_formed(length, window, size):
    """The logits of all blocks that hold a visible one."""
    seen = np.asarray(Mask(jnp.arange(length)[None], jnp.arange(length)[None], window).visible()[0])
    blocks = seen.reshape(length // size, size, length // size, size).any(axis=(1, 3))
    return blocks.sum() * size**2


def test_wide_blocks_would_be_mostly_hidden():
    """The figure that `block_size` gives as its reason."""
    ratio = logits_formed(2048, 256, 512) / logits_formed(2048, 256, 256)
    assert round(ratio, 1) == 1.9


@given(
    length=st.integers(1, 400),
    window=st.one_of(st.none(), st.integers(1, 300)),
    cuts=st.lists(st.integers(1, 399), max_size=3),
    padding=st.integers(0, 200),
)
@settings(max_examples=5)
def test_equals_dense_and_so_do_its_gradients(length, window, cuts, padding):
    """Several blocks, ragged ends, documents within blocks and across them, and left padding."""
    rng = np.random.default_rng(length)
    index = np.arange(length)
    padding = min(padding, length - 1)
    begins = np.array([0, *sorted(cut for cut in cuts if cut < length - padding)])
    positions = np.where(index >= padding, index - padding, -1)
    segment_starts = begins[np.searchsorted(begins, np.maximum(positions, 0), side="right") - 1]
    mask = Mask(
        *jnp.asarray([positions[None]] * 2), window, True, jnp.asarray(segment_starts[None])
    )
    q, k, v, grad = jnp.asarray(rng.normal(size=(4, 1, 2, length, 8)), jnp.float32)

    def with_gradients(kernel):
        y, pull = jax.vjp(lambda *qkv: kernel(*qkv, mask)[:, :, padding:], q, k, v)
        return y, *pull(grad[:, :, padding:])

    ours, oracle = (jax.jit(with_gradients, static_argnums=0)(f) for f in (interpreted, dense))
    for mine, expected in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-5)


CONFIG = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    vocab_size=200,
    max_length=256,
    window_size=100,
    eos_token_id=-1,
)


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Whole sequences go to splash, in float32 for the sake of the comparison."""

    def choose(kernel, q, mask, device, is_split=False):
        return "splash" if mask.aligned else "dense"

    monkeypatch.setattr(attention, "choose", choose)
    monkeypatch.setitem(attention.KERNELS, "splash", interpreted)
    prepared = functools.partial(context.causal_kernel, interpret=True)
    monkeypatch.setattr(context, "causal_kernel", prepared)


def loss_and_gradients(sharding, params):
    """Of four rows of 200 tokens, each of two documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 200, (4, 201)).astype(np.int32)
    segment_starts = np.where(np.arange(200) < 130, 0, 130)[None].repeat(4, axis=0).astype(np.int32)
    batch = Batch(jnp.asarray(tokens), jnp.ones((4, 200)), jnp.asarray(segment_starts))
    objective = functools.partial(NextToken().loss, Neo(CONFIG, sharding=sharding))
    return jax.jit(jax.value_and_grad(lambda p: objective(p, batch).objective))(params)


def greedy(sharding, params):
    settings = make_settings(SamplingOptions(temperature=0.0), [0] * 2)
    prompts = [list(range(150)), [7] * 30]
    model = Neo(CONFIG, sharding=sharding)
    return [done.ids for done in engine.generate(model, params, prompts, 8, settings)]


@pytest.fixture(scope="module")
def blocked_results():
    params = jax.jit(lambda key: init_params(Neo(CONFIG), key))(jax.random.key(0))
    return params, loss_and_gradients(None, stack(params, CONFIG)), greedy(None, params)


@pytest.mark.parametrize(
    ("mesh", "rules"),
    [
        ("data=2,model=4", "tensor"),
        ("fsdp=4,model=2", "fsdp+tensor"),
        ("data=2,fsdp=2,model=2", "decode"),
        ("fsdp=2,context=2", "embed:fsdp,length:context"),
    ],
)
def test_training_and_prefill_under_every_strategy(blocked_results, as_on_a_tpu, mesh, rules):
    params, (loss, grads), texts = blocked_results
    devices = jax.devices()[: 4 if mesh in ("data=4", "data=2,fsdp=2", "fsdp=2,context=2") else 8]
    sharding = make_sharding(mesh, rules, devices=devices)
    our_loss, our_grads = loss_and_gradients(sharding, stack(params, CONFIG))
    np.testing.assert_allclose(our_loss, loss, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(our_grads), jax.tree.leaves(grads), strict=True):
        distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert distance < 1e-5
    assert greedy(sharding, params) == texts


def test_padding_on_the_left_changes_nothing(blocked_results, as_on_a_tpu):
    """The kernel knows no positions: the model tells it of padding."""
    params = blocked_results[0]
    apply = jax.jit(lambda *args: Neo(CONFIG).apply({"params": params}, *args).logits)
    tokens = np.random.default_rng(1).integers(1, 200, (1, 140))
    padded = np.pad(tokens, ((0, 0), (60, 0)))
    positions = np.maximum(np.arange(200) - 60, -1)[None]
    ours = apply(jnp.asarray(padded), jnp.asarray(positions))[:, 60:]
    np.testing.assert_allclose(ours, apply(jnp.asarray(tokens)), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("remat", "forward"), [("none", 2), ("products", 4), ("full", 4)])
def test_what_rematerialisation_runs_again(as_on_a_tpu, remat, forward):
    """A backward pass without remat keeps the output and the sums; with it, the kernel runs again.

    Two layers: the forward kernel once for each, and again where it is computed again.
    """
    model = Neo(CONFIG)
    params = jax.eval_shape(lambda: stack(init_params(model, jax.random.key(0)), CONFIG))
    rows = jax.ShapeDtypeStruct((1, 128), jnp.float32)
    batch = Batch(jax.ShapeDtypeStruct((1, 129), jnp.int32), rows)
    gradient = jax.grad(lambda p, b: NextToken().loss(model, p, b, remat=remat, unroll=2).objective)
    program = str(jax.make_jaxpr(gradient)(params, batch))
    kernels = {name: program.count(f"name=splash_mha_{name}") for name in ("fwd", "dq", "dkv")}
    assert kernels == {"fwd": forward, "dq": 2, "dkv": 2}
