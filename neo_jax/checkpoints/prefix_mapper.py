"""Mappers from features to prefixes on disk: adapters of a kind of our own, PREFIX_MAPPER.

adapter_config.json names the model and the sizes, adapter_model.safetensors has the kernels and
biases by their names in `neo_jax.model.prefix_mapper`.
"""

import contextlib
import functools
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax.axes import Params
from neo_jax.checkpoints.adapter_files import CONFIG, open_adapter, read_floats, write_adapter
from neo_jax.config import ModelConfig
from neo_jax.devices.processes import is_leader, to_host
from neo_jax.errors import NeoError, checked
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path
from neo_jax.model.prefix_mapper import init_mapper

KIND = "PREFIX_MAPPER"
"""The type of the adapter."""

_MOST = 1 << 24  # of each size


def describe_mapper(folder: Path) -> dict[str, Any]:
    """Returns what a mapper is, by name, without reading its weights or its model.

    Raises:
      NeoError: see `load_mapper`.
    """
    features, tokens, hidden = _sizes(folder)
    return {
        "adapter": str(folder),
        "base_model": read_json(folder / CONFIG).get("base_model_name_or_path"),
        "kind": KIND,
        "features": features,
        "virtual_tokens": tokens,
        "hidden": hidden,
    }


def load_mapper(folder: str | os.PathLike[str], config: ModelConfig) -> Params:
    """Reads a mapper for a model, float32.

    Raises:
      NeoError: the model is a classifier; or files are missing or damaged, or are for another
        model; the message names the file, and the field or tensor.
    """
    path = make_path(folder)
    config.head.check_writes()
    features, tokens, hidden = _sizes(path)
    if tokens >= config.max_length:
        raise NeoError(
            f"{path / CONFIG}: num_virtual_tokens {tokens} must be below the model's context, "
            f"{config.max_length}."
        )
    make = functools.partial(
        init_mapper, features=features, tokens=tokens, width=config.embed_dim, hidden=hidden
    )
    shapes = flatten_dict(jax.eval_shape(make, jax.random.key(0)), sep=".")
    with contextlib.ExitStack() as files:
        source, found = open_adapter(path, files)
        params = {
            name: read_floats(source, found.pop(name, None), name, leaf.shape)
            for name, leaf in shapes.items()
        }
    return unflatten_dict(params, sep=".")


def save_mapper(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    mapper: Params,
    *,
    base: str,
    tokenizer: Any = None,
) -> None:
    """Writes a mapper.

    The arguments are those of `neo_jax.checkpoints.peft.save_adapter`; raises as that does.
    """
    leaves = flatten_dict(mapper, sep=".")
    arrays = {name: to_host(leaf).astype(np.float32) for name, leaf in leaves.items()}
    if not is_leader():
        return
    tokens, width, _ = arrays["out.kernel"].shape
    hidden = len(arrays["hidden.bias"]) if "hidden.bias" in arrays else 0
    first = arrays["hidden.kernel" if hidden else "out.kernel"]
    fields = {
        "peft_type": KIND,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_features": first.shape[-1],
        "hidden_size": hidden,
    }
    write_adapter(folder, base, fields, arrays, {}, tokenizer)


def _sizes(folder: Path) -> tuple[int, int, int]:
    """Returns how many features a mapper takes, how many embeddings it makes, its hidden units."""
    path, fields = folder / CONFIG, read_json(folder / CONFIG)
    found = []
    for name, least in (("num_features", 1), ("num_virtual_tokens", 1), ("hidden_size", 0)):
        size = checked(f"{path}: {name}", fields.get(name), int)
        if not least <= size <= _MOST:
            raise NeoError(f"{path}: {name} {size} must lie between {least} and {_MOST:,}.")
        found.append(size)
    features, tokens, hidden = found
    return features, tokens, hidden
