"""Soft prompts on disk, in PEFT's format: adapters of the kinds PROMPT_TUNING and P_TUNING.

Either kind is a table [virtual tokens, D] before the embeddings of a text (Lester et al., 2021;
Liu et al., "GPT understands, too", 2021): how it was made, as it stands or by a small network,
matters in training only.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from neo_jax.axes import Array
from neo_jax.checkpoints.adapter_files import CONFIG, open_adapter, read_floats, write_adapter
from neo_jax.config import ModelConfig
from neo_jax.devices.processes import is_leader, to_host
from neo_jax.errors import NeoError, brief, checked
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path
from neo_jax.model.soft_prompt import PROMPT

KINDS = ("PROMPT_TUNING", "P_TUNING")
"""PEFT's types of adapters that are soft prompts."""

# Fields that do not change what a soft prompt computes, or that are checked below.
_NEUTRAL = frozenset(
    """
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode
    num_virtual_tokens token_dim num_transformer_submodules num_attention_heads num_layers
    prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs
    encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout
    """.split()
)


def describe_soft_prompt(folder: Path) -> dict[str, Any]:
    """Returns what a soft prompt is, by name, without reading its weights or its model.

    Raises:
      NeoError: see `load_soft_prompt`.
    """
    fields = _read_config(folder)
    with contextlib.ExitStack() as files:
        source, found = open_adapter(folder, files)
        if PROMPT not in found:
            raise NeoError(f"{source} lacks {PROMPT}; copy it again.")
        shape, dtype = found[PROMPT].shape, found[PROMPT].dtype
    return {
        "adapter": str(folder),
        "base_model": fields.get("base_model_name_or_path"),
        "kind": fields["peft_type"],
        "virtual_tokens": shape[0],
        "parameters": int(np.prod(shape)),
        "dtype": dtype,
    }


def load_soft_prompt(folder: str | os.PathLike[str], config: ModelConfig) -> np.ndarray:
    """Reads a soft prompt: float32 [virtual tokens, D].

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors or adapter_model.bin.
      config: of the model that it is for.

    Raises:
      NeoError: the model is a classifier; or files are missing or damaged, are for another model,
        leave it no room for a text, or say what is not supported; the message names the file, and
        the field or tensor.
    """
    path = make_path(folder)
    config.head.check_writes()
    count = checked("num_virtual_tokens", _read_config(path).get("num_virtual_tokens"), int)
    if not 0 < count < config.max_length:
        raise NeoError(
            f"{path / CONFIG}: num_virtual_tokens {count} must lie between 1 and "
            f"{config.max_length - 1}, for the model's context is {config.max_length}."
        )
    with contextlib.ExitStack() as files:
        source, found = open_adapter(path, files)
        table = read_floats(source, found.pop(PROMPT, None), PROMPT, (count, config.embed_dim))
    if found:
        raise NeoError(f"{source} holds the tensor {next(iter(found))} next to a soft prompt.")
    return table


def save_soft_prompt(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    table: Array,
    *,
    base: str,
    tokenizer: Any = None,
) -> None:
    """Writes a soft prompt [virtual tokens, D] so that this package and PEFT read it.

    The arguments are those of `neo_jax.checkpoints.peft.save_adapter`; raises as that does.
    """
    array = to_host(table).astype(np.float32)
    if not is_leader():
        return
    fields = {
        "peft_type": KINDS[0],
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": len(array),
        "token_dim": config.embed_dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "prompt_tuning_init": "RANDOM",
    }
    write_adapter(folder, base, fields, {PROMPT: array}, {}, tokenizer)


def _read_config(folder: Path) -> dict[str, Any]:
    """Returns the fields of an adapter_config.json, of which all are known."""
    path = folder / CONFIG
    fields: dict[str, Any] = read_json(path)
    for name, value in fields.items():
        if name not in _NEUTRAL and value not in (None, False, [], {}):
            raise NeoError(f"{path}: {name} is {brief(value)}, which is not supported.")
    wanted = {"task_type": (None, "CAUSAL_LM"), "num_transformer_submodules": (None, 1)}
    for name, values in wanted.items():
        if fields.get(name) not in values:
            raise NeoError(
                f"{path}: {name} is {brief(fields[name])}; this loads soft prompts of language "
                f"models, of which it is {brief(values[1])}."
            )
    return fields
