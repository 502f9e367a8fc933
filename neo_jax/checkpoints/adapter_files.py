"""The folder of an adapter in PEFT's format: the model that it is for, and its tensors."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from neo_jax.checkpoints import hub
from neo_jax.checkpoints.formats import FLOATS, StoredTensor, open_file
from neo_jax.checkpoints.host_device import copy
from neo_jax.errors import NeoError, brief, reason
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file, make_path, write_whole

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OLD_WEIGHTS = "adapter_model.bin"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return is_file(folder / CONFIG) and not is_file(folder / "config.json")


def adapter_kind(folder: Path) -> Any:
    """Returns what adapter_config.json has as PEFT's type of an adapter."""
    return read_json(folder / CONFIG).get("peft_type")


def base_folder(folder: Path, *, token: str | None = None) -> Path:
    """Returns the folder of the model that an adapter is for; a model's is its own.

    Args:
      folder: what `neo_jax.checkpoints.hub.resolve` returned.
      token: for gated and private repositories.

    Raises:
      NeoError: the adapter names no model, or one that cannot be found.
    """
    if not is_adapter(folder):
        return folder
    fields = read_json(folder / CONFIG)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name:
        raise NeoError(
            f"{folder / CONFIG} names no model in base_model_name_or_path; write there the folder "
            "or the hub name of the model that the adapter is for."
        )
    if not isinstance(revision, str | None):
        raise NeoError(f"{folder / CONFIG}: revision {brief(revision)} is no name.")
    try:
        return hub.resolve(name, revision=revision, token=token)
    except NeoError as error:
        raise NeoError(f"base_model_name_or_path in {folder / CONFIG}: {error}") from error


def open_adapter(folder: Path, files: contextlib.ExitStack) -> tuple[Path, dict[str, StoredTensor]]:
    """Returns the file of an adapter's weights, and what it holds."""
    old = folder / OLD_WEIGHTS
    if is_file(folder / WEIGHTS) or not is_file(old):
        return folder / WEIGHTS, open_file(folder / WEIGHTS, files)
    from neo_jax.checkpoints.formats import torch_file

    return old, torch_file.open_file(old, files)


def read_floats(
    source: Path, stored: StoredTensor | None, name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """Returns a tensor of an adapter, float32.

    Raises:
      NeoError: it is not there, or of another shape or kind, or not finite.
    """
    if stored is None:
        raise NeoError(f"{source} lacks {name}; copy it again.")
    if stored.shape != shape or stored.dtype not in FLOATS:
        raise NeoError(
            f"{source}: {name} is {stored.dtype} {list(stored.shape)}, not of floats "
            f"{list(shape)}; is the adapter for this model?"
        )
    return copy(stored.view(), np.dtype(np.float32), shape, f"{source}: {name}")


def write_adapter(
    folder: str | os.PathLike[str],
    base: str,
    fields: Mapping[str, Any],
    arrays: dict[str, np.ndarray],
    others: Mapping[str, str],
    tokenizer: Any = None,
) -> None:
    """Writes an adapter; of several processes one calls this.

    Args:
      folder: made where it does not exist.
      base: the model that it is for, as `neo_jax.load` takes it.
      fields: of adapter_config.json, without the model.
      arrays: the tensors, by PEFT's names.
      others: the contents of other files, by their names.
      tokenizer: anything with `save(folder)`, or None.

    Raises:
      NeoError: the folder cannot be written.
    """
    named = {"base_model_name_or_path": hub.PUBLISHED.get(base.lower(), base)}
    place = make_path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(place)
        for name, content in others.items():
            write_whole(place / name, content)
        write_whole(place / WEIGHTS, save(arrays, {"format": "pt"}))
        write_whole(place / CONFIG, json.dumps({**fields, **named}, indent=2) + "\n")
    except OSError as error:
        raise NeoError(f"cannot save to {folder}: {reason(error)}.") from error
