"""neo_jax/training/loss.py: the loss by transformers'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import GPTNeoForCausalLM

from neo_jax.model import init_params
from neo_jax.names import tensors
from neo_jax.pretrained import save_pretrained
from neo_jax.training import loss
from neo_jax.training.loss import Batch

loss_sum = jax.jit(loss.loss_sum, static_argnums=0)
mean_loss = jax.jit(loss.mean_loss, static_argnums=0)
gradients = jax.jit(jax.grad(loss.mean_loss, argnums=1), static_argnums=0)


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
            row.to_hf(np.asarray(ours)), expected, rtol=0, atol=2e-5 * scale, err_msg=row.hf_name
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
