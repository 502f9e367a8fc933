"""training/objectives/classification.py next to transformers' and torch's AdamW, and on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers

from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.classification import Batch, Classification
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import init_state, make_step, state_of

PAD = 95
CONFIGS = {
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=2, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32, num_labels=3,
        attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0, pad_token_id=PAD,
        eos_token_id=PAD,
    ),
    "gpt2": transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=32, num_labels=3,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=PAD, eos_token_id=PAD,
    ),
}  # fmt: skip


def make_theirs(family, folder, **fields):
    torch.manual_seed(0)
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | fields)
    model = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation="eager"
    )
    model.save_pretrained(folder)
    return model


def batches(count, problem="single_label_classification", labels=3):
    """Texts of unequal lengths, right-padded."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        lengths = rng.integers(1, 24, 8)
        tokens = np.where(
            np.arange(24) < lengths[:, None], rng.integers(0, PAD, (8, 24)), PAD
        ).astype(np.int32)
        found = rng.integers(0, labels, 8).astype(np.int32)
        if problem == "multi_label_classification":
            found = rng.integers(0, 2, (8, labels)).astype(np.float32)
        if problem == "regression":
            found = rng.normal(size=8).astype(np.float32)
        yield Batch(tokens, lengths.astype(np.int32), found, np.ones(8, np.float32))


def of_torch(model, batch):
    tokens = torch.tensor(batch.tokens.astype(np.int64))
    labels = torch.tensor(batch.labels)
    labels = labels.long() if labels.dtype == torch.int32 else labels
    return model(tokens, attention_mask=(tokens != PAD).long(), labels=labels).loss


@pytest.mark.parametrize("family", CONFIGS)
def test_twenty_steps_of_adamw_have_the_losses_of_transformers(family, tmp_path):
    theirs = make_theirs(family, tmp_path)
    optimizer = torch.optim.AdamW(
        theirs.parameters(), 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    expected = []
    for batch in batches(20):
        loss = of_torch(theirs, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.step()
        expected.append(loss.item())

    config = TrainConfig(
        data="", output="", steps=20, batch_size=8, model=read_config(tmp_path), length=24,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, beta2=0.999
        ),
        dtype="float32",
    )  # fmt: skip
    optimizer = make_optimizer(config.optimizer, config.steps)
    model = Neo(config.model)
    step = make_step(model, optimizer, config)  # the config's head says what it minimises
    state = state_of(stack(load_params(tmp_path, config.model), config.model), optimizer)
    found = []
    for batch in batches(20):
        state, metrics = step(state, batch)
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert abs(found[0] - found[-1]) > 1e-3


@pytest.mark.parametrize(
    ("problem", "labels"), [("multi_label_classification", 3), ("regression", 1)]
)
def test_other_problem_types_have_the_losses_of_transformers(tmp_path, problem, labels):
    theirs = make_theirs("gpt_neo", tmp_path, num_labels=labels, problem_type=problem)
    config = read_config(tmp_path)
    params = stack(load_params(tmp_path, config), config)
    (batch,) = batches(1, problem, labels)
    objective = Classification(config.head)
    sums = jax.jit(functools.partial(objective.loss, Neo(config)))(params, batch)
    assert float(sums.loss / sums.weight) == pytest.approx(of_torch(theirs, batch).item(), abs=1e-6)
    # A row that fills the batch counts for nothing.
    batch = batch._replace(weights=np.array([1, 0] * 4, np.float32))
    half = jax.tree.map(lambda x: x[::2], batch)
    found = float(jax.jit(functools.partial(objective.loss, Neo(config)))(params, batch).loss)
    assert found / 4 == pytest.approx(of_torch(theirs, half).item(), abs=1e-6)


def test_a_step_on_a_mesh_is_that_of_one_device(tmp_path):
    make_theirs("gpt_neo", tmp_path)
    config = TrainConfig(
        data="", output="", steps=2, batch_size=8, model=read_config(tmp_path), length=24,
        optimizer=OptimizerConfig(warmup_steps=0), dtype="float32",
    )  # fmt: skip
    results = []
    for mesh in ("", "data=2,fsdp=2,model=2"):
        config = dataclasses.replace(config, mesh=mesh)
        model = Neo(config.model, sharding=make_sharding(mesh))
        optimizer = make_optimizer(config.optimizer, config.steps)
        objective = Classification(config.model.head)
        state = init_state(model, optimizer, 0, objective=objective)
        step = make_step(model, optimizer, config, objective)
        for batch in batches(2):
            state, metrics = step(state, batch)
        results.append((metrics["loss"], metrics["gradient_norm"], jax.device_get(state.params)))
    np.testing.assert_allclose(results[1][:2], results[0][:2], rtol=1e-5)
    assert results[0][2]["score"]["kernel"].std() > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *[r[2] for r in results]
    )
