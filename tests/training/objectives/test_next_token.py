"""training/objectives/next_token.py: the loss by transformers', in blocks of any size."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPTNeoForCausalLM

from neo_jax.checkpoints.save import save_pretrained
from neo_jax.model.scan import abstract_params, stack, unstack
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo, init_params
from neo_jax.ops import tuning
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.objectives.next_token import Batch, NextToken

pytestmark = pytest.mark.optimized


@functools.partial(jax.jit, static_argnums=0)
def loss_sum(model, params, batch):
    losses = NextToken().loss(model, stack(params, model.config), batch)
    return losses.loss, losses.weight


@functools.partial(jax.jit, static_argnums=0)
def mean_loss(model, params, batch):
    total, weight = loss_sum(model, params, batch)
    return total / jnp.maximum(weight, 1)


@functools.partial(jax.jit, static_argnums=0)
def gradients(model, params, batch):
    """Gradients of the mean, by the canonical tree."""

    def mean(stacked):
        losses = NextToken().loss(model, stacked, batch)
        return losses.objective / jnp.maximum(losses.weight, 1)

    return unstack(jax.grad(mean)(stack(params, model.config)), model.config)


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    model, params = tiny
    folder = tmp_path_factory.mktemp("loss")
    save_pretrained(folder, model.config, params)
    return GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture
def tokens(rng):
    return jnp.asarray(rng.integers(0, 96, (3, 40), dtype=np.int32))


WEIGHTS = {
    "all": np.ones((3, 39), np.float32),
    "some": np.random.default_rng(1).integers(0, 2, (3, 39)).astype(np.float32),
    "one": np.eye(3, 39, k=20, dtype=np.float32) * [[1], [0], [0]],
    "a padded tail": np.arange(39)[None] < np.array([[39], [20], [0]]),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_the_loss_is_that_of_transformers(tiny, reference, tokens, name):
    model, params = tiny
    weights = WEIGHTS[name].astype(np.float32)
    labels = np.array(tokens, np.int64)
    labels[:, 1:][weights == 0] = -100
    with torch.no_grad():
        theirs = reference(
            torch.from_numpy(np.array(tokens)), labels=torch.from_numpy(labels)
        ).loss.item()
    batch = Batch(tokens, weights)
    assert float(mean_loss(model, params, batch)) == pytest.approx(theirs, rel=1e-6)
    total, count = loss_sum(model, params, batch)
    assert float(count) == weights.sum()
    assert float(total) == pytest.approx(theirs * weights.sum(), rel=1e-6)


def test_gradients_are_those_of_transformers(tiny, reference, tokens):
    model, params = tiny
    weights = WEIGHTS["some"]
    labels = np.array(tokens, np.int64)
    labels[:, 1:][weights == 0] = -100
    reference.zero_grad()
    reference(torch.from_numpy(np.array(tokens)), labels=torch.from_numpy(labels)).loss.backward()
    grads = gradients(model, params, Batch(tokens, weights))
    theirs = dict(reference.named_parameters())
    for row in tensors(model.config):
        ours = grads
        for key in row.path:
            ours = ours[key]
        expected = theirs[row.hf_name].grad.numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            row.to("hf", np.asarray(ours)), expected, rtol=0, atol=2e-5 * scale, err_msg=row.hf_name
        )


def test_weights_may_be_fractions(tiny, tokens, rng):
    model, params = tiny
    weights = rng.random((3, 39)).astype(np.float32)
    logits = jax.jit(model.apply)({"params": params}, tokens[:, :-1]).logits
    logprobs = np.asarray(jax.nn.log_softmax(logits), np.float64)
    losses = -np.take_along_axis(logprobs, np.array(tokens)[:, 1:, None], -1)[..., 0]
    expected = (losses * weights).sum() / weights.sum()
    assert float(mean_loss(model, params, Batch(tokens, weights))) == pytest.approx(
        expected, rel=1e-6
    )


def test_a_batch_of_padding_has_no_loss(tiny, tokens):
    model, params = tiny
    batch = Batch(tokens, np.zeros((3, 39), np.float32))
    assert float(mean_loss(model, params, batch)) == 0
    grads = gradients(model, params, batch)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


def test_an_untrained_model_guesses(tiny, tokens):
    model, _ = tiny
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(1))
    guess = float(mean_loss(model, params, Batch(tokens, WEIGHTS["all"])))
    assert guess == pytest.approx(np.log(96), rel=0.02)


def plain(model, params, batch, z_loss):
    """The objective with all logits at once."""
    logits = model.apply({"params": params}, batch.tokens[:, :-1]).logits
    log_sum = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum(batch.weights * (log_sum - chosen + z_loss * log_sum**2))


@pytest.mark.parametrize("block_tokens", [1, 3, 15, 39 * 3, 1024])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_blocks_of_any_size_and_the_z_loss(tiny, tokens, monkeypatch, block_tokens, z_loss):
    """One token a block, blocks that do not divide the length, and all at once."""
    model, params = tiny
    monkeypatch.setattr(tuning, "LOSS_TOKENS", block_tokens)
    batch = Batch(tokens, jnp.asarray(WEIGHTS["some"]))

    def blocked(params):
        losses = NextToken(z_loss).loss(model, stack(params, model.config), batch)
        return losses.objective, losses

    (objective, losses), grads = jax.jit(jax.value_and_grad(blocked, has_aux=True))(params)
    expected, expected_grads = jax.jit(
        jax.value_and_grad(lambda params: plain(model, params, batch, z_loss))
    )(params)
    assert float(objective) == pytest.approx(float(expected), rel=1e-6)
    without = float(plain(model, params, batch, 0.0))
    assert float(losses.loss) == pytest.approx(without, rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_parameters_travel_in_the_dtype_of_products(tiny_config):
    """Devices gather every kernel and the head's table in half of the bytes; ids are ids."""
    model = Neo(tiny_config, jnp.bfloat16, sharding=make_sharding("fsdp=4"))
    batch = Batch(jax.ShapeDtypeStruct((4, 41), jnp.int32), jax.ShapeDtypeStruct((4, 40), "f4"))

    def losses(params, batch):
        return NextToken().loss(model, params, batch).objective

    for function in (losses, jax.grad(losses)):
        program = str(jax.make_jaxpr(function)(abstract_params(model), batch))
        gathered = re.findall(r":(\w+)\[[\d,]+\] = all_gather\b", program)
        assert set(gathered) == {"bf16", "i32"}
        assert len(gathered) >= 6 * tiny_config.num_layers // 2 + 1  # of one unit, and the table


def test_all_logits_never_exist(tiny):
    """The memory of a step does not grow with length times vocabulary."""
    model, _ = tiny
    config = dataclasses.replace(
        model.config, num_layers=2, vocab_size=50_000, max_length=4096, window_size=64
    )
    model = Neo(config)
    params = jax.eval_shape(lambda key: stack(init_params(model, key), config), jax.random.key(0))
    batch = Batch(
        jax.ShapeDtypeStruct((1, 4097), jnp.int32), jax.ShapeDtypeStruct((1, 4096), jnp.float32)
    )
    gradient = jax.grad(lambda params, batch: NextToken().loss(model, params, batch).objective)
    text = jax.jit(gradient).lower(params, batch).compile().as_text()
    assert "[1,512,50048]" in text  # a block's
    assert "4096,50048]" not in text
