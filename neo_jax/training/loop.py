"""The training loop: batches in, steps, evaluations, checkpoints."""

import bisect
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.peft import save_adapter
from neo_jax.checkpoints.prefix_mapper import save_mapper
from neo_jax.checkpoints.prompt_tuning import save_soft_prompt
from neo_jax.checkpoints.save import remove_leftovers, save_pretrained
from neo_jax.data.feed import HostBatch, batches, evaluation_batches
from neo_jax.data.labelled import LabelledDataset, labelled_batches
from neo_jax.data.mixture import Mixture
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.devices import probe
from neo_jax.devices.processes import holding, is_leader, say
from neo_jax.errors import NeoError
from neo_jax.files.paths import make_path
from neo_jax.model.prefix_mapper import MAPPER
from neo_jax.model.scan import unstack
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.config import TrainConfig
from neo_jax.training.initial_state import (
    begin_soft_prompt,
    find_pretrained,
    first_state,
    load_stacked,
)
from neo_jax.training.interrupt import Interrupt
from neo_jax.training.labelled import (
    is_exhausted,
    make_evaluation,
    metrics_of,
    open_split,
    with_labels,
)
from neo_jax.training.objectives import Objective
from neo_jax.training.objectives.classification import Classification
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.preflight import check_run, check_size
from neo_jax.training.report import Evaluation, Report
from neo_jax.training.snapshot import base_of
from neo_jax.training.step import (
    TrainState,
    abstract_inputs,
    abstract_state,
    make_model,
    make_objective,
    make_step,
    merge_trainable,
)
from neo_jax.transforms.lora import merge


class Outcome(NamedTuple):
    """What became of a run."""

    state: TrainState  # the last one
    is_done: bool  # else it was requested to stop before its end, and goes on when it is run again


def train(config: TrainConfig) -> TrainState:
    """Runs a config, see `run`; returns the final state."""
    return run(config).state


def run(config: TrainConfig) -> Outcome:
    """Trains to the last step, from the newest checkpoint in `config.output` if there is one.

    Leaves in the output folder: checkpoints/, best.json, metrics.jsonl, loss.png, what else the
    config requests, and model/, which `neo_jax.load` and transformers read; where adapters were
    trained, adapter/ for PEFT, which model/ has merged; of a soft prompt that alone. Several
    processes (see `neo_jax.devices.processes`) that call this are one run, and all need to see that
    folder; checkpoints of any mesh and any number of processes go on. SIGTERM and Ctrl-C let the
    running step end, save and return; the second one does what it always did.

    Returns:
      The final state, which may be of a later step if the run has gone further before; or that of
      the step at which the run was requested to stop: then without model/. And whether it is done.

    Raises:
      NeoError: see `check_run`; no data or no output is named, the data set does not fit the model,
        or the folder cannot be written, or another run writes to it.
    """
    for name in ("data", "output"):
        if not getattr(config, name):
            raise NeoError(f"{name} must name a folder, not be empty.")
    probe.start()
    with holding(make_path(config.output), inside=True):
        return _run(config)


class _Parts(NamedTuple):
    """What a run works with, checked."""

    config: TrainConfig  # with the head and the number of steps that follow from the data
    pretrained: Path | None  # the folder of the model to begin with
    dataset: Mixture | LabelledDataset
    model: Neo
    tokenizer: Tokenizer
    objective: Objective
    optimizer: optax.GradientTransformation
    step: Any  # see `make_step`
    abstract: TrainState
    place: "Placement"
    evaluate: Callable[[Params], Evaluation] | None
    sample: Callable[[Params], list[str]]


def _run(config: TrainConfig) -> Outcome:
    """`run`, in an output folder that no other run writes to."""
    parts = _prepared(config)
    config = parts.config
    frozen = None
    if parts.pretrained and config.is_frozen:
        frozen = load_stacked(parts.model, parts.pretrained, parts.model.dtype, with_head=False)
    base, output = base_of(frozen) if frozen else {}, make_path(config.output)
    metric = metrics_of(config)[0] if config.model.head.is_classifier else ""
    folder_of = output / "checkpoints", config.keep, config.keep_every, base, metric
    trained = functools.partial(merge_trainable, frozen=frozen, lora=config.lora)
    with Interrupt() as interrupt, Checkpoints(*folder_of) as checkpoints:
        state = _steps(parts, frozen, trained, checkpoints, interrupt)
        ended, params = int(state.step), state.params
        best = checkpoints.best[1]
        is_early = ended < config.steps and is_exhausted(config, ended, best)
        if is_early:
            say(f"no evaluation was better since step {best}: the run ends at {ended}")
        # Of a classifier, and where a run waits for something better, the best is what is left.
        is_done = is_early or ended >= config.steps
        if is_done and (metric or config.patience) and best not in (0, ended):
            found = checkpoints.restore_best(parts.abstract, config)
            params = found.params if found else params
    if is_done:
        _export(config, unstack(trained(params), config.model), parts.tokenizer)
    return Outcome(state, is_done)


def _prepared(config: TrainConfig) -> _Parts:
    """Opens and checks what a run needs, before its first checkpoint is looked for."""
    config, folder = find_pretrained(config)
    dataset = open_split(config, "train")
    config = with_labels(config, dataset)
    _check_vocabulary(config, dataset)
    sharding = make_sharding(config.mesh, config.rules)
    if sharding is None and jax.process_count() > 1:
        raise NeoError("a run of several processes needs a mesh; add for example --mesh fsdp=-1.")
    model = make_model(config, sharding)
    check_size(config, model)
    optimizer = make_optimizer(config.optimizer, config.steps)
    objective = make_objective(config)
    step = make_step(model, optimizer, config, objective)
    batch, needed = abstract_inputs(config, model, dataset.has_segment_starts, objective)
    place = Placement(model, batch)
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    evaluate = _make_evaluation(config, model, objective, place)
    abstract = abstract_state(model, optimizer, config.lora, objective)
    sample = _make_sampler(config, model, tokenizer)
    check_run(config, model, step, abstract, batch, needed)
    return _Parts(
        config, folder, dataset, model, tokenizer, objective, optimizer, step, abstract, place,
        evaluate, sample,
    )  # fmt: skip


def _steps(
    parts: _Parts,
    frozen: Params | None,
    trained: Callable[[Params], Params],
    checkpoints: Checkpoints,
    interrupt: Interrupt,
) -> TrainState:
    """Trains from the newest checkpoint to the last step, a signal, or the end of patience.

    Args:
      parts: of the run.
      frozen: stacked parameters that are not trained, if there are any.
      trained: makes the whole model's of what is trained.
      checkpoints: has what was saved, and takes what is to be.
      interrupt: says whether a signal came.
    """
    config, dataset = parts.config, parts.dataset
    restored = checkpoints.restore_latest(parts.abstract, config)
    state = restored or first_state(
        config, parts.model, parts.optimizer, parts.pretrained, parts.objective
    )
    if not restored and frozen and config.soft_prompt.shared:
        state = begin_soft_prompt(state, frozen, config, parts.tokenizer)
    start = int(state.step)
    size, seed, rows = config.batch_size, config.seed, parts.place.rows
    make_feed: Any = labelled_batches if isinstance(dataset, LabelledDataset) else batches
    feed = make_feed(dataset, batch_size=size, seed=seed, start_step=start, rows=rows)
    sharding = parts.model.sharding
    num_devices = sharding.mesh.size if sharding else 1
    tokens = dataset.mean_length * size if isinstance(dataset, LabelledDataset) else 0.0
    numbers = Report(
        config, start, dataset.bytes_per_token, num_devices, checkpoints.changes, tokens
    )
    stop = is_exhausted(config, start, checkpoints.best[1])
    with numbers as report:
        for step in range(start + 1, config.steps + 1):
            if stop:
                break
            state, metrics = parts.step(state, parts.place(next(feed)), frozen)
            report.step(step, metrics)
            last, stop, value = step == config.steps, interrupt.requested(), math.nan
            if config.eval_every and (last or step % config.eval_every == 0):
                if parts.evaluate:
                    evaluation = parts.evaluate(trained(state.params))
                    report.evaluation(step, evaluation)
                    value = evaluation.least
                    best = step if checkpoints.is_best(value) else checkpoints.best[1]
                    stop = stop or is_exhausted(config, step, best)
                report.samples(step, parts.sample(trained(state.params)))
            if last or stop or step % config.save_every == 0 or checkpoints.is_best(value):
                report.sync()  # a run that goes on from here writes later lines only
                checkpoints.save(state, config, value)
    return state


def _export(config: TrainConfig, params: Params, tokenizer: Tokenizer) -> None:
    """Writes what a run leaves for use: model/, and adapter/ where adapters were trained."""
    output = make_path(config.output)
    if config.soft_prompt.tokens:  # which does not merge
        place = output / "adapter"
        options: Any = {"base": config.pretrained, "tokenizer": tokenizer}
        if config.soft_prompt.features:
            save_mapper(place, config.model, params[MAPPER], **options)
        else:
            save_soft_prompt(place, config.model, params[PROMPT], **options)
        return
    if config.lora.rank:
        save_adapter(
            output / "adapter",
            config.model,
            config.lora,
            params,
            base=config.pretrained,
            tokenizer=tokenizer,
        )
    if is_leader():  # who writes it, and may be writing by now
        remove_leftovers(output / "model")
    # The frozen weights of adapters are of the dtype of products; every run leaves float32.
    save_pretrained(
        output / "model", config.model, merge(params), tokenizer=tokenizer, dtype=jnp.float32
    )


def _check_vocabulary(config: TrainConfig, dataset: Mixture | LabelledDataset) -> None:
    is_there = isinstance(dataset, LabelledDataset) or dataset.parts
    if is_there and dataset.vocab_size > config.model.vocab_size:
        missing = dataset.vocab_size - config.model.vocab_size
        fix = "model.vocab_size"
        if config.pretrained:
            fix = f"new_tokens to {config.new_tokens + missing}"
        raise NeoError(
            f"{config.data} has a vocabulary of {dataset.vocab_size}, the model one of "
            f"{config.model.vocab_size}; set {fix}, or prepare with its tokenizer."
        )


class Placement:
    """Which rows of a batch the devices of this process hold, and their way there.

    That is for the mesh to say: it may give processes the same rows, or rows that are far apart.
    """

    def __init__(self, model: Neo, spec: Any):
        """Splits the rows of batches; `spec` is the batch of `abstract_inputs`."""
        self._vocab_size = model.config.vocab_size + model.virtual_tokens
        self._spec, leaf = spec, jax.tree.leaves(spec)[0]
        self.rows = list(range(leaf.shape[0]))
        if leaf.sharding:
            held: Any = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
            self.rows = sorted({row for index in held for row in self.rows[index[0]]})

    def __call__(self, batch: HostBatch) -> Any:
        """Puts a batch of the rows of this process onto the devices; returns the global batch.

        Raises:
          NeoError: a token is beyond the vocabulary, which the model would take for another one.
        """
        largest = batch["tokens"].max()
        if largest >= self._vocab_size:
            raise NeoError(
                f"the data set holds the token {largest}, beyond the vocabulary of "
                f"{self._vocab_size}: its files are damaged; copy them again, or run neo-jax "
                "prepare again."
            )
        fields = self._spec._asdict().items()
        placed = {name: self._put(leaf, batch[name]) for name, leaf in fields if leaf is not None}
        return self._spec._replace(**placed)

    def _put(self, leaf: jax.ShapeDtypeStruct, local: np.ndarray) -> Array:
        if leaf.sharding is None:
            return jnp.asarray(local)

        def piece(index: Any) -> np.ndarray:
            first, stop, _ = index[0].indices(leaf.shape[0])
            start = bisect.bisect_left(self.rows, first)
            return local[start : start + stop - first]

        shape = (leaf.shape[0], *local.shape[1:])  # a batch may be of shorter sequences
        return jax.make_array_from_callback(shape, leaf.sharding, piece)


def _make_evaluation(
    config: TrainConfig, model: Neo, objective: Objective, place: Placement
) -> Callable[[Params], Evaluation] | None:
    """Returns a function that evaluates the held-out splits; None where there is no need of it."""
    if isinstance(objective, Classification):
        return make_evaluation(config, model, objective, place)
    dataset = open_split(config, "held_out") if config.eval_every else None
    if not isinstance(dataset, Mixture) or not dataset.parts:
        return None
    _check_vocabulary(config, dataset)
    num_bytes = sum(part.num_target_bytes for part in dataset.parts)
    sums_of = jax.jit(functools.partial(objective.evaluate, model))

    def evaluate(params: Params) -> Evaluation:
        total = weight = 0.0
        for part in dataset.parts:
            for batch in evaluation_batches(part, config.batch_size, place.rows):
                sums = sums_of(params, place(batch))
                total, weight = total + float(sums.loss), weight + float(sums.weight)
        return Evaluation(total / weight, total / math.log(2) / num_bytes)

    return evaluate


def _make_sampler(
    config: TrainConfig, model: Neo, tokenizer: Tokenizer
) -> Callable[[Params], list[str]]:
    """Returns what continues the prompts of a config by stacked parameters; all processes call it.

    The draws are the same each time, only weights differ.

    Raises:
      NeoError: a prompt is empty, or does not fit the context with its continuation.
    """
    length, prompts = config.sample_tokens, [tokenizer.encode(text) for text in config.prompts]
    settings = make_settings(SamplingOptions(), list(range(len(prompts))))
    if not prompts:
        return lambda params: []
    engine.check_prompts(model, prompts, length)

    def sample(params: Params) -> list[str]:
        done = engine.generate(model, unstack(params, model.config), prompts, length, settings)
        decoders = [StreamDecoder(tokenizer, prompt) for prompt in prompts]
        pairs = zip(decoders, done, strict=True)
        return [decoder.push(new.ids) + decoder.flush() for decoder, new in pairs]

    return sample
