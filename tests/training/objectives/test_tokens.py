"""training/objectives/tokens.py next to transformers' modules and torch's AdamW, and on a mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.labels import HeadConfig
from neo_jax.model.scan import stack
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.classification import Batch
from neo_jax.training.objectives.tokens import QuestionAnswering, TokenClassification
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.step import init_state, make_objective, make_step, state_of

PAD, NONE, LENGTH, ROWS, STEPS = 95, -100, 24, 8, 20
SHAPES = {
    "gpt_neo": transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, window_size=8,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32,
        attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0, classifier_dropout=0.0,
        vocab_size=96, pad_token_id=PAD, eos_token_id=PAD,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, n_positions=32, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0, classifier_dropout=0.0, vocab_size=96, pad_token_id=PAD,
        eos_token_id=PAD,
    ),
}  # fmt: skip
AUTO = {"classifier": "TokenClassification", "qa_outputs": "QuestionAnswering"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of transformers' models, by family and head."""

    @functools.cache
    def make(family, kind):
        torch.manual_seed(0)
        labels = 4 if kind == "classifier" else 2
        config = type(SHAPES[family])(**SHAPES[family].to_dict() | {"num_labels": labels})
        model = getattr(transformers, f"AutoModelFor{AUTO[kind]}").from_config(config)
        path = tmp_path_factory.mktemp(f"{family}-{kind}")
        model.save_pretrained(path)
        return path

    return make


def batches(kind, is_even=False):
    """Texts of unequal lengths, or of one length a batch, and their labels, some of them none."""
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        lengths = rng.integers(4, LENGTH, ROWS).astype(np.int32)
        lengths = np.full_like(lengths, lengths[0]) if is_even else lengths
        tokens = rng.integers(0, PAD, (ROWS, LENGTH)).astype(np.int32)
        is_text = np.arange(LENGTH) < lengths[:, None]
        if kind == "classifier":
            labels = np.where(rng.random((ROWS, LENGTH)) < 0.6, tokens % 4, NONE)
            labels = np.where(is_text, labels, NONE)
        else:
            start = rng.integers(0, lengths - 2)
            labels = np.stack([start, start + rng.integers(0, 2, ROWS)], axis=1)
            labels[rng.integers(ROWS)] = NONE
        weights = np.ones(ROWS, np.float32)
        yield Batch(np.where(is_text, tokens, 0), lengths, labels.astype(np.int32), weights)


def of_torch(model, batch, side):
    """The loss of transformers, of a batch that is padded on a side, or not at all."""
    width = LENGTH if side else batch.lengths[0]
    shift = (width - batch.lengths) * (side == "left")
    index = np.arange(width) - shift[:, None]  # of each token in its text
    is_text = (index >= 0) & (index < batch.lengths[:, None])
    at = (np.arange(ROWS)[:, None], np.clip(index, 0, LENGTH - 1))
    inputs = {
        "input_ids": np.where(is_text, batch.tokens[at], PAD),
        "attention_mask": is_text,
        "position_ids": np.maximum(index, 0),
    }
    inputs = {name: torch.tensor(each).long() for name, each in inputs.items()}
    if batch.labels.shape[1] == LENGTH:  # of tokens
        labels = np.where(is_text, batch.labels[at], NONE)
        return model(**inputs, labels=torch.tensor(labels).long()).loss
    # An end that is outside transformers ignores.
    ends = np.where(batch.labels < 0, width, batch.labels + shift[:, None])
    start, end = torch.tensor(ends).long().T
    if not side:  # what it computes of a text is of the text alone
        return model(**inputs, start_positions=start, end_positions=end).loss
    output = model(**inputs)
    logits = [torch.where(torch.tensor(is_text), each, -torch.inf) for each in output[:2]]
    pairs = zip(logits, (start, end), strict=True)
    return sum(cross_entropy(each, x, ignore_index=int(width)) for each, x in pairs) / 2


def losses_of_torch(folder, kind, found, side):
    load = getattr(transformers, f"AutoModelFor{AUTO[kind]}").from_pretrained
    model = load(folder, attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(
        model.parameters(), 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    for batch in found:
        loss = of_torch(model, batch, side)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@functools.cache
def our_step(path):
    """The step of a run from a folder, of whose config's head it is to learn, and its state."""
    config = TrainConfig(
        data="", output="", steps=STEPS, batch_size=ROWS, model=read_config(path), length=LENGTH,
        optimizer=OptimizerConfig(
            learning_rate=1e-3, schedule="constant", warmup_steps=0, beta2=0.999
        ),
        dtype="float32",
    )  # fmt: skip
    optimizer, model = make_optimizer(config.optimizer, config.steps), Neo(config.model)
    step = make_step(model, optimizer, config)

    def state():
        return state_of(stack(load_params(path, config.model), config.model), optimizer)

    return step, state


def our_losses(path, found):
    step, make_state = our_step(path)
    state, losses = make_state(), []
    for batch in found:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize(
    ("kind", "is_even", "sides"),
    [
        ("classifier", False, ("right", "left")),
        # Of padding transformers would count the logits.
        ("qa_outputs", True, ("",)),
        ("qa_outputs", False, ("left",)),
    ],
)
def test_twenty_steps_of_adamw_have_the_losses_of_transformers(
    folder, family, kind, is_even, sides
):
    path, found = folder(family, kind), [*batches(kind, is_even)]
    ours = our_losses(path, found)
    assert abs(ours[0] - ours[-1]) > 1e-2
    for side in sides:
        expected = losses_of_torch(path, kind, found, side)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", AUTO)
def test_a_step_on_a_mesh_is_that_of_one_device(folder, kind):
    """In parts too, whose labels are not of one number."""
    config = TrainConfig(
        data="",
        output="",
        steps=2,
        batch_size=ROWS,
        model=read_config(folder("gpt_neo", kind)),
        length=LENGTH,
        optimizer=OptimizerConfig(warmup_steps=0, epsilon=1e-4),
        dtype="float32",
    )  # fmt: skip  (of what moves all logits alike, as ln_f's bias does, gradients are noise)
    results = []
    for mesh, parts in (("", 1), ("data=2,fsdp=2,model=2", 2)):
        config = dataclasses.replace(config, mesh=mesh, accumulation=parts)
        model = Neo(config.model, sharding=make_sharding(mesh))
        optimizer = make_optimizer(config.optimizer, config.steps)
        objective = make_objective(config)
        state = init_state(model, optimizer, 0, objective=objective)
        step = make_step(model, optimizer, config, objective)
        for batch in [*batches(kind)][:2]:
            state, metrics = step(state, batch)
        results.append((metrics["loss"], metrics["gradient_norm"], jax.device_get(state.params)))
    np.testing.assert_allclose(results[1][:2], results[0][:2], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5), *[r[2] for r in results]
    )


def test_what_a_head_reads_is_dropped_where_the_model_drops(folder):
    """As transformers' classifier_dropout, and only where there is a key."""
    model = Neo(read_config(folder("gpt_neo", "classifier")))
    batch = next(batches("classifier"))
    hidden = jax.numpy.ones((ROWS, LENGTH, 32))
    params = {"classifier": {"kernel": jax.numpy.eye(4, 32), "bias": jax.numpy.zeros(4)}}
    head = dataclasses.replace(model.config.head, dropout=0.25)
    key = jax.random.key(0)
    found = np.asarray(TokenClassification(head)._logits(model, params, batch, hidden, key))
    assert np.unique(found.round(5)).tolist() == [0, pytest.approx(4 / 3, abs=1e-5)]
    assert 0.2 < np.mean(found == 0) < 0.3
    assert (TokenClassification(head)._logits(model, params, batch, hidden, None) == 1).all()


def test_an_answer_that_is_not_read_has_no_weight():
    batch = next(batches("qa_outputs"))
    unread = batch.labels[:, 0] < 0
    assert unread.any()
    logits = jax.random.normal(jax.random.key(1), (ROWS, LENGTH, 2))
    objective = QuestionAnswering(HeadConfig("qa_outputs", ("start", "end")))
    sums = objective.sums(logits, batch)
    assert float(sums.weight) == ROWS - unread.sum()
    other = objective.sums(jax.numpy.where(unread[:, None, None], 9, logits), batch)
    assert float(other.loss) == float(sums.loss)
