"""Prompts that begin with embeddings of their own, such as what features of an image map to."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Float
from neo_jax.decode.capacity import round_up
from neo_jax.errors import NeoError, reason
from neo_jax.model.prefix_mapper import MAPPER, map_features
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.text.generate import Prompt
from neo_jax.text.language_model import LanguageModel


def with_prefixes(
    lm: LanguageModel, prefixes: Float[Any, "N P D"], prompts: Sequence[Prompt]
) -> tuple[LanguageModel, list[list[int]]]:
    """Returns a model that knows prefixes, and prompts as ids that begin with them.

    The model shares all parameters with `lm`, and has a virtual token for each embedding; it takes
    the prompts wherever it takes ids: `generate`, `samples`, `stream`, `score`. A soft prompt comes
    before them.

    Args:
      lm: the model.
      prefixes: P embeddings for each prompt.
      prompts: texts or lists of ids, which follow; "" is nothing.

    Raises:
      NeoError: prefixes of another shape, of another width than the model's, or not finite; or not
        as many as prompts.
    """
    config, sharding = lm.config, lm.model.sharding
    table = _floats("prefixes", prefixes)
    if table.ndim != 3 or not table.shape[1]:
        raise NeoError(
            f"prefixes are of shape {list(table.shape)}; give [prompts, embeddings, width]."
        )
    count, length, width = table.shape
    if width != config.embed_dim:
        raise NeoError(f"prefixes are {width} wide, and the model {config.embed_dim}.")
    if count != len(prompts):
        raise NeoError(f"{count} prefixes are for as many prompts, not {len(prompts)}.")
    _check_finite("prefixes", table)
    known = lm.model.virtual_tokens
    first = config.vocab_size + known
    rows = round_up(count * length)  # few sizes, so few programs
    table = np.pad(table.reshape(-1, width), ((0, rows - count * length), (0, 0)))
    if known:
        table = np.concatenate([np.asarray(lm.params[PROMPT], np.float32), table])
    place = sharding.named((None, None), table.shape, PROMPT) if sharding else None
    params = {**lm.params, PROMPT: jax.device_put(jnp.asarray(table), place)}
    model = lm.model.clone(virtual_tokens=len(table))
    ids = [
        [*range(start, start + length), *(lm.encode(prompt) if len(prompt) else ())]
        for start, prompt in zip(range(first, first + count * length, length), prompts, strict=True)
    ]
    return LanguageModel(model, params, lm.tokenizer, lm.folder, lm.defaults), ids


def with_features(
    lm: LanguageModel, features: Float[Any, "N I"], prompts: Sequence[Prompt]
) -> tuple[LanguageModel, list[list[int]]]:
    """Returns a model and prompts as `with_prefixes` does, of what the model's mapper makes.

    Args:
      lm: a model that was loaded with a mapper, which `train --soft-prompt.features` leaves.
      features: a row for each prompt.
      prompts: texts or lists of ids, which follow; "" is nothing.

    Raises:
      NeoError: the model has no mapper; features of another shape or width than it takes, or that
        are not finite; or not as many as prompts.
    """
    mapper = lm.params.get(MAPPER)
    if mapper is None:
        raise NeoError(
            "the model maps no features; load what a run with soft_prompt.features left in adapter."
        )
    rows = _floats("features", features)
    size = mapper["hidden" if "hidden" in mapper else "out"]["kernel"].shape[-1]
    if rows.ndim != 2 or rows.shape[1] != size:
        raise NeoError(f"features are of shape {list(rows.shape)}; the model maps [texts, {size}].")
    _check_finite("features", rows)
    return with_prefixes(lm, np.asarray(jax.jit(map_features)(mapper, rows)), prompts)


def _floats(name: str, values: Any) -> np.ndarray:
    try:
        return np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise NeoError(f"{name} are no array of numbers ({reason(error)}).") from error


def _check_finite(name: str, array: np.ndarray) -> None:
    if not np.isfinite(array).all():
        raise NeoError(f"{name} hold numbers that are not finite.")
