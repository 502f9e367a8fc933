"""Attention of sequences that devices share equals that of one device, whatever they exchange."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo_jax.devices import torus
from neo_jax.errors import NeoError
from neo_jax.ops import attention
from neo_jax.ops.attention import Mask, attend, choose, context, dense, splash
from neo_jax.sharding.rules import make_sharding

CASES = [
    # mesh, rules, tokens, window, where documents begin, kernel
    ("context=8", "length:context", 64, 5, (0,), "blocked"),
    ("context=8", "length:context", 64, 20, (0, 9, 40), "blocked"),  # three shards back
    ("context=4", "length:context", 12, 100, (0, 5), "blocked"),  # more than there are
    ("context=8", "length:context", 8, 1, (0,), "blocked"),  # a token each, no halo
    ("context=4", "length:context", 20, None, (0, 7, 8), "blocked"),
    ("fsdp=2,context=2,model=2", "length:context,heads:model", 30, 9, (0, 20), "blocked"),
    ("context=2,model=4", "length:model+context", 24, 4, (0,), "blocked"),
    ("context=2,model=4", "length:context+model,heads:model", 24, 4, (0, 11), "blocked"),
    ("context=4", "length:context", 32, None, (0, 3, 30), "dense"),
    ("context=4", "length:context", 32, 11, (0, 30), "dense"),
    ("context=4", "length:context", 52, None, (0,), "splash"),  # halves of unequal size
    ("context=3", "length:context", 600, None, (0, 100, 512), "splash"),
    ("context=8", "length:context", 320, 131, (0, 129, 300), "splash"),  # four shards back
    ("data=2,context=2,model=2", "length:context,heads:model", 64, None, (0, 9), "splash"),
]


def test_an_axis_along_two_of_a_torus(monkeypatch):
    """An axis of 4 is cut into two of 2, as where it spans two of a TPU slice's."""
    torus.along_torus.cache_clear()
    monkeypatch.setattr(torus, "_torus_sizes", lambda n: (2, 2) if len(n) == 4 else (len(n),))
    for case in CASES:
        if "context=4" in case[0] and case[-1] != "splash":
            test_equals_dense_and_so_do_its_gradients(monkeypatch, *case)
    torus.along_torus.cache_clear()


@pytest.mark.parametrize(("mesh", "rules", "length", "window", "begins", "kernel"), CASES)
def test_equals_dense_and_so_do_its_gradients(
    monkeypatch, mesh, rules, length, window, begins, kernel
):
    interpreted = functools.partial(splash, interpret=True)
    monkeypatch.setitem(attention.KERNELS, "splash", interpreted)
    prepared = functools.partial(context.causal_kernel, interpret=True)
    monkeypatch.setattr(context, "causal_kernel", prepared)
    monkeypatch.setattr(attention, "choose", lambda *_: kernel)
    sharding = make_sharding(mesh, rules)
    rng = np.random.default_rng(length)
    positions = jnp.arange(length)[None].repeat(2, axis=0)
    starts = np.asarray(begins)[np.searchsorted(begins, np.arange(length), side="right") - 1]
    starts = None if begins == (0,) else jnp.asarray(starts)[None].repeat(2, axis=0)
    mask = Mask(positions, positions, window, True, starts)
    q, k, v, grad = jnp.asarray(rng.normal(size=(4, 2, 4, length, 8)), jnp.float32)

    def with_gradients(function):
        y, pull = jax.vjp(lambda *qkv: function(*qkv, mask), q, k, v)
        return y, *pull(grad)

    split = functools.partial(attend, kernel=kernel, sharding=sharding)
    ours, oracle = (jax.jit(with_gradients, static_argnums=0)(f) for f in (split, dense))
    for mine, expected in zip(ours, oracle, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=2e-5)


def test_every_device_has_the_same_work():
    """As many pairs of a query and a key that it sees, to one in a hundred."""

    def dealt(num_shards, size):
        mesh = make_sharding(f"context={num_shards}", "length:context").mesh
        return context._Split(mesh, ("context",), size).dealt()

    pairs = (dealt(8, 64) + 1).sum(axis=1)
    assert pairs.max() < 1.01 * pairs.min()
    assert sorted(dealt(3, 5).reshape(-1)) == list(range(15))


def test_a_kernel_that_cannot_names_another():
    q = jnp.zeros((1, 1, 8, 8), jnp.bfloat16)
    mask = Mask(jnp.zeros((1, 8), int), jnp.zeros((1, 8), int), aligned=True)

    class Device:
        platform, compute_capability = "gpu", "9.0"

    assert choose("auto", q, mask, Device()) == "cudnn"
    assert choose("auto", q, mask, Device(), is_split=True) == "blocked"
    message = r"'cudnn' kernel serves no sequence that the rules split .*; use 'blocked'\."
    with pytest.raises(NeoError, match=message):
        choose("cudnn", q, mask, Device(), is_split=True)
