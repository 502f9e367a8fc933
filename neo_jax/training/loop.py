"""The training loop: batches in, steps, evaluations, checkpoints."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from neo_jax import axes
from neo_jax.data.feed import Batch as HostBatch
from neo_jax.data.feed import batches, evaluation_batches
from neo_jax.data.packing import TokenDataset, split_names
from neo_jax.data.tokenizer import load_tokenizer
from neo_jax.errors import NeoError
from neo_jax.model import Neo
from neo_jax.paths import make_path
from neo_jax.pretrained import save_pretrained
from neo_jax.sharding import make_sharding
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.config import TrainConfig
from neo_jax.training.loss import Batch, loss_sum
from neo_jax.training.optimizer import make_optimizer, make_schedule
from neo_jax.training.report import Evaluation, Report
from neo_jax.training.state import TrainState, init_state, make_step


def train(config: TrainConfig) -> TrainState:
    """Trains to the last step, from the newest checkpoint in `config.output` if there is one.

    Leaves in the output folder: checkpoints/, metrics.jsonl, and model/, which `neo_jax.load` and
    transformers read.

    Returns:
      The final state.

    Raises:
      NeoError: the data set does not fit the model, or the folder cannot be written.
    """
    dataset = _open_split(config, "train")
    sharding = make_sharding(config.mesh, config.rules)
    model = Neo(config.model, jnp.dtype(config.dtype), config.kernel, sharding)
    optimizer = make_optimizer(config.optimizer, config.steps)
    train_step = make_step(model, optimizer, make_schedule(config.optimizer, config.steps))
    evaluate = _make_evaluation(config, model)
    output = make_path(config.output)
    with Checkpoints(output / "checkpoints", config.keep) as checkpoints:
        state = checkpoints.restore_latest(init_state(model, optimizer, config.seed), config)
        start = int(state.step)
        feed = batches(dataset, batch_size=config.batch_size, seed=config.seed, start_step=start)
        with Report(config, start) as report:
            for step in range(start + 1, config.steps + 1):
                state, metrics = train_step(state, _place(model, next(feed)))
                report.step(step, metrics)
                last = step == config.steps
                if evaluate and (last or step % config.eval_every == 0):
                    report.evaluation(step, evaluate(state))
                if last or step % config.save_every == 0:
                    report.sync()  # a run that goes on from here writes later lines only
                    checkpoints.save(state, config)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    save_pretrained(output / "model", config.model, state.params, tokenizer=tokenizer)
    return state


def _open_split(config: TrainConfig, split: str) -> TokenDataset:
    dataset = TokenDataset.open(config.data, split, config.sequence_length)
    if dataset.vocab_size > config.model.vocab_size:
        raise NeoError(
            f"{config.data} has a vocabulary of {dataset.vocab_size}, the model one of "
            f"{config.model.vocab_size}; set model.vocab_size, or prepare with its tokenizer."
        )
    return dataset


def _place(model: Neo, batch: HostBatch) -> Batch:
    """Puts a batch onto the devices, its rows split as the rules say."""
    tokens, weights = batch["tokens"], batch["weights"]
    if model.sharding is None:
        return Batch(jnp.asarray(tokens), jnp.asarray(weights))
    rows = model.sharding.named((axes.BATCH, None), tokens.shape, "batch")
    return Batch(
        jax.make_array_from_process_local_data(rows, tokens),
        jax.make_array_from_process_local_data(rows, weights),
    )


def _make_evaluation(config: TrainConfig, model: Neo) -> Callable[[TrainState], Evaluation] | None:
    """Returns a function that evaluates the held-out split; None where there is no need of it."""
    if not config.eval_every or "held_out" not in split_names(config.data):
        return None
    dataset = _open_split(config, "held_out")
    loss_fn = jax.jit(lambda params, batch: loss_sum(model, params, batch))

    def evaluate(state: TrainState) -> Evaluation:
        total = weight = 0.0
        for batch in evaluation_batches(dataset, config.batch_size):
            loss, count = loss_fn(state.params, _place(model, batch))
            total, weight = total + float(loss), weight + float(count)
        return Evaluation(total / weight, total / math.log(2) / dataset.num_bytes)

    return evaluate
