"""Where a run starts: from weights that are drawn, or from those of a pretrained checkpoint."""

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import Array, Float, Params
from neo_jax.checkpoints import hub
from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.labels import HeadConfig
from neo_jax.model.scan import abstract_params, stack
from neo_jax.model.soft_prompt import PROMPT, without_prompt
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import Tokenizer
from neo_jax.training.config import TrainConfig
from neo_jax.training.objectives import Objective
from neo_jax.training.step import TrainState, init_state, make_objective, state_of, state_shardings
from neo_jax.transforms.soft_prompt import first_words


def find_pretrained(config: TrainConfig) -> tuple[TrainConfig, Path | None]:
    """Returns a config with the model of the checkpoint it starts from, and its folder, if any.

    Raises:
      NeoError: it cannot be found or read, the config describes another model, its length does not
        fit, or there are to be adapters or new tokens of no model, or both of one.
    """
    if config.new_tokens and config.is_frozen:
        raise NeoError(
            "adapters do not train embeddings, so those of new_tokens would never be learned; set "
            "lora.rank and soft_prompt.tokens, or new_tokens to 0."
        )
    if not config.pretrained:
        if config.new_tokens:
            raise NeoError("new_tokens are for a model in pretrained; set model.vocab_size here.")
        if config.lora.rank:
            raise NeoError("lora.rank needs a model to adapt; name one in pretrained, or set it 0.")
        if config.soft_prompt.tokens:
            raise NeoError(
                "soft_prompt.tokens are read before a model's texts; name it in pretrained."
            )
        return config, None
    if config.soft_prompt.features and config.prompts:
        raise NeoError("prompts have no features to be mapped; leave prompts out.")
    folder = hub.resolve(config.pretrained)
    return config.with_model(read_config(folder)), folder


def first_state(
    config: TrainConfig,
    model: Neo,
    optimizer: optax.GradientTransformation,
    folder: Path | None,
    objective: Objective | None = None,
) -> TrainState:
    """Returns the state before the first step; `folder` is what `find_pretrained` found."""
    objective = objective or make_objective(config)
    if folder is None or config.is_frozen:
        return init_state(model, optimizer, config.seed, config.lora, objective)
    start = functools.partial(state_of, optimizer=optimizer)
    stored = dataclasses.replace(
        model.config,
        vocab_size=model.config.vocab_size - config.new_tokens,
        max_length=read_config(folder).max_length,
    )
    params = load_stacked(model.clone(config=stored), folder, jnp.float32)
    if stored.max_length < model.config.max_length:
        longer = jax.jit(extend_positions, static_argnums=(1, 2))
        table = longer(params["wpe"]["embedding"], model.config.max_length, config.new_positions)
        params = params | {"wpe": {"embedding": table}}
    if config.new_tokens:
        grown = jax.jit(functools.partial(_grow, before=stored, after=model.config))
        for table in {"wte", stored.unembedding}:
            params = params | {table: {"embedding": grown(params[table]["embedding"])}}
    params = objective.init(model, jax.random.key(config.seed)) | params
    shardings = state_shardings(model, optimizer, jax.eval_shape(start, params))
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)(params)


def begin_soft_prompt(
    state: TrainState, frozen: Params, config: TrainConfig, tokenizer: Tokenizer
) -> TrainState:
    """Returns a first state whose soft prompt is the embeddings of words; see `first_words`."""
    soft = config.soft_prompt
    words = tokenizer.encode(soft.init_text, False) if soft.init_text else []
    ids = first_words(soft.tokens, words, config.model.vocab_size, config.seed)
    old = state.params[PROMPT]

    def rows(table: Array) -> Array:  # a product, which is exact: the table may be split in any way
        chosen = jax.nn.one_hot(ids, len(table))
        return jnp.matmul(chosen, table.astype(old.dtype), precision=jax.lax.Precision.HIGHEST)

    found = jax.jit(rows, out_shardings=old.sharding)(frozen["wte"]["embedding"])
    return state._replace(params={**state.params, PROMPT: found})


def _grow(table: Array, before: ModelConfig, after: ModelConfig) -> Array:
    """Adds rows to an embedding table, float32, each the mean of those of the vocabulary."""
    mean = table.sum(axis=0, keepdims=True) / before.vocab_size  # the rows beyond it are zeros
    table = jnp.pad(table, ((0, after.padded_vocab_size - before.padded_vocab_size), (0, 0)))
    row = jnp.arange(after.padded_vocab_size)[:, None]
    return jnp.where((before.vocab_size <= row) & (row < after.vocab_size), mean, table)


def extend_positions(
    table: Float[Array, "P D"], length: int, how: Literal["repeated", "interpolated"]
) -> Float[Array, "length D"]:
    """Returns learned positions for more tokens than a model was trained with.

    Repeated, a token finds itself as far from those in its window as in training, and what is known
    of the first P positions holds for every P that follow (Beltagy et al., "Longformer", 2020,
    section 5). Interpolated, positions are as many as before but closer (Chen et al., "Extending
    context window of large language models via positional interpolation", 2023, section 2.3).
    Either is a start, to be trained on.
    """
    index = jnp.arange(length)
    if how == "repeated":
        return table[index % len(table)]
    place = index * ((len(table) - 1) / (length - 1))
    left = jnp.minimum(place.astype(jnp.int32), len(table) - 2)
    share = (place - left)[:, None]
    return table[left] * (1 - share) + table[left + 1] * share


def load_stacked(model: Neo, folder: Path, dtype: DTypeLike, with_head: bool = True) -> Params:
    """Reads the weights of a checkpoint into the stacked tree; each array is where it lives.

    A classifier has no output head of a language model's; its own comes with the rest, unless
    `with_head` is false, where the checkpoint has one of the same labels.

    Raises:
      NeoError: see `neo_jax.checkpoints.load.load_params`.
    """
    stored, head = read_config(folder), model.config.head
    if dataclasses.replace(stored.head, dropout=head.dropout) != head or not with_head:
        stored = dataclasses.replace(stored, head=HeadConfig())
    stacked = functools.partial(stack, config=stored)
    before = after = None
    if sharding := model.sharding:
        rows = tensors(stored)
        places = {t.path: sharding.named(t.axes, t.shape, "/".join(t.path)) for t in rows}
        before = unflatten_dict(places)
        after = jax.tree.map(
            lambda leaf: leaf.sharding, abstract_params(without_prompt(model).clone(config=stored))
        )
        if stored.head.is_classifier:
            after[head.kind] = before[head.kind]
    params = load_params(folder, stored, dtype=dtype, shardings=before)
    params = jax.jit(stacked, out_shardings=after)(params)
    if head.is_classifier:
        params.pop("lm_head", None)
    return params
