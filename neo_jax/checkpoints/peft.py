"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, or .bin.

What is read are adapters of low rank (LoRA) of linear maps and of tables, with or without norms of
their own (DoRA), and parameters that were trained in whole next to them. They are merged into the
model as it is loaded. Soft prompts, which do not merge, are in `prompt_tuning`.
"""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax.axes import Params
from neo_jax.checkpoints.adapter_files import CONFIG, open_adapter, read_floats, write_adapter
from neo_jax.checkpoints.formats import StoredTensor
from neo_jax.checkpoints.host_device import copy, shard
from neo_jax.checkpoints.peft_config import (
    LABELS,
    MERGE,
    TASKS,
    PeftConfig,
    adapted_head,
    read_peft_config,
)
from neo_jax.config import ModelConfig
from neo_jax.devices.processes import is_leader, to_host
from neo_jax.errors import NeoError
from neo_jax.files.paths import make_path
from neo_jax.labels import CLASSIFIERS
from neo_jax.model.low_rank import LowRank
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.transforms.lora import LoraConfig, with_norms

_PREFIX = "base_model.model."
_TABLE, _HEAD = ("wte", "embedding"), ("lm_head", "embedding")


def save_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    lora: LoraConfig,
    params: Params,
    *,
    base: str,
    tokenizer: Any = None,
) -> None:
    """Writes the adapters of a model so that this package and PEFT read them.

    Where `params` are on several processes, all of them call this, and the first writes.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      lora: what they were trained by.
      params: the canonical tree, with a `LowRank` in the place of each kernel that has an adapter.
      base: the model that they are for, as `neo_jax.load` takes it.
      tokenizer: anything with `save(folder)`, or None.

    Raises:
      NeoError: the folder cannot be written.
    """
    leaves = flatten_dict(params)
    adapted = [
        [(row, leaves[row.path]) for row in rows if isinstance(leaves[row.path], LowRank)]
        for rows in _groups(config).values()
        if rows[0].num_inputs
    ]
    rank = lora.rank * max(map(len, adapted))
    arrays: dict[str, np.ndarray] = {}
    for parts in filter(None, adapted):
        arrays |= _joined(parts, rank)
    for row in (row for row in tensors(config) if row.path[0] in CLASSIFIERS):
        arrays[f"{_PREFIX}{row.hf_name}"] = to_host(leaves[row.path]).astype(np.float32)
    if not is_leader():
        return
    fields = {
        "peft_type": "LORA",
        "task_type": TASKS[config.head.kind],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({_module(parts[0][0], config) for parts in adapted if parts}),
        "bias": "none",
        "fan_in_fan_out": config.family.transposed,
        "modules_to_save": [config.head.kind] if config.head.is_classifier else None,
    }
    others = {}
    if named := config.head.to_hf(config.family.prefix, None):
        # PEFT leaves labels to whoever loads.
        others[LABELS] = json.dumps(named, indent=2) + "\n"
    write_adapter(folder, base, fields, arrays, others, tokenizer)


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Returns what an adapter is, by name, without reading its weights or its model.

    Raises:
      NeoError: see `load_adapter`.
    """
    config = read_peft_config(folder / CONFIG)
    with contextlib.ExitStack() as files:
        found = open_adapter(folder, files)[1].values()
        parameters = sum(math.prod(stored.shape) for stored in found)
        dtypes = sorted({stored.dtype for stored in found})
    return {
        "adapter": str(folder),
        "base_model": config.base,
        "rank": config.rank,
        "alpha": config.alpha,
        "targets": config.targets,
        "parameters": parameters,
        "dtype": "+".join(dtypes),
    }


class Change(NamedTuple):
    """What is learned next to a matrix of the model, as float32 arrays on the host."""

    a: np.ndarray  # as in `LowRank`
    b: np.ndarray
    scale: float
    norms: np.ndarray | None  # of the outputs, [outputs...], for DoRA


class Adapter(NamedTuple):
    """What a folder holds for a model."""

    config: ModelConfig  # of the model with it, whose output head may be one of its own
    replaced: dict[tuple[str, ...], np.ndarray]  # parameters that were trained in whole, float32
    changes: dict[tuple[str, ...], Change]


def load_adapter(folder: str | os.PathLike[str], config: ModelConfig) -> Adapter:
    """Reads an adapter; its parts have the paths of parameters.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors or adapter_model.bin.
      config: of the model that it is for.

    Raises:
      NeoError: files are missing or damaged, are for another model, or say what is not supported;
        the message names the file, and the field or tensor.
    """
    path = make_path(folder)
    said = read_peft_config(path / CONFIG)
    changes: dict[tuple[str, ...], Change] = {}
    replaced: dict[tuple[str, ...], np.ndarray] = {}
    with contextlib.ExitStack() as files:
        source, found = open_adapter(path, files)
        names = {kind: f"{_PREFIX}{kind}.weight" for kind in CLASSIFIERS}
        sizes = {kind: found[name].shape[0] for kind, name in names.items() if name in found}
        config = dataclasses.replace(config, head=adapted_head(path, config.head, sizes))
        # The output head has a name of its own also where it is the table of tokens.
        groups = _groups(dataclasses.replace(config, tied_head=False))
        for rows in groups.values():
            if rows[0].path[-1] in ("kernel", "embedding"):
                changes |= _changes(source, found, rows, said)
        for name in [*found]:
            same = groups.get(name.removeprefix(_PREFIX).replace(".base_layer.", "."))
            if same:
                whole = read_floats(source, found.pop(name), name, same[0].places["hf"].whole)
                for row in same:
                    replaced[row.path] = copy(row.of("hf", whole), whole.dtype, row.shape)
    if found or not changes:
        what = f"the tensor {next(iter(found))}" if found else "no adapters"
        raise NeoError(
            f"{source} holds {what}; this loads LoRA of linear maps and tables, DoRA of linear "
            f"maps, and whole parameters next to them; {MERGE}."
        )
    if config.tied_head and not _keeps_tie(said, replaced, changes):
        config = dataclasses.replace(config, tied_head=False)
    return Adapter(config, replaced, changes)


def _keeps_tie(
    said: PeftConfig,
    replaced: dict[tuple[str, ...], np.ndarray],
    changes: dict[tuple[str, ...], Change],
) -> bool:
    """Whether the output head is the table of tokens also with an adapter of one of them."""
    table, head = replaced.get(_TABLE), replaced.get(_HEAD)
    if {_TABLE, _HEAD}.isdisjoint(changes):
        if table is None and head is None:
            return True
        if table is not None and (said.ties_head if head is None else np.array_equal(table, head)):
            replaced.pop(_HEAD, None)
            return True
    if said.ties_head:
        raise NeoError(
            f"{said.path}: ensure_weight_tying is true for an adapter of the table of tokens or "
            f"the head, which is not supported; {MERGE}."
        )
    return False


def apply_adapter(adapter: Adapter, params: Params, shardings: Params | None = None) -> Params:
    """Returns canonical parameters with an adapter merged into them, of the dtypes that they had.

    Args:
      adapter: what `load_adapter` returned.
      params: the model that it is for; consumed.
      shardings: a tree like the parameters of `adapter.config`, where each array is to live.

    Raises:
      NeoError: a parameter of the adapter has no finite value in the dtype of the model.
    """
    leaves = flatten_dict(params)
    places = flatten_dict(shardings) if shardings else {}
    if adapter.config.tied_head:
        leaves.pop(_HEAD, None)  # in the place of which there may be a classifier's
    elif _HEAD not in leaves:
        leaves[_HEAD] = jnp.copy(leaves[_TABLE])
    for path, array in adapter.replaced.items():
        dtype, name = leaves.get(path, leaves[_TABLE]).dtype, "/".join(path)
        leaves[path] = (
            shard(array, dtype, array.shape, places[path], name)
            if path in places
            else jax.device_put(copy(array, dtype, array.shape, name))
        )

    def apply(params: Params, changes: Any) -> Params:
        merged = flatten_dict(params)
        for path, (a, b, scale, norms) in changes.items():
            kernel = LowRank(merged[path], a, b, scale).merged()
            kernel = kernel if norms is None else with_norms(kernel, norms)
            merged[path] = kernel.astype(merged[path].dtype)
        return unflatten_dict(merged)

    run = jax.jit(apply, out_shardings=shardings, donate_argnums=0)
    return run(unflatten_dict(leaves), adapter.changes)


def _changes(
    source: Path, found: dict[str, StoredTensor], rows: list[Tensor], said: PeftConfig
) -> dict[tuple[str, ...], Change]:
    """Takes the adapter of a matrix out of what is stored; returns it for each of its parts."""
    names, module, n = _names(rows[0]), _module_name(rows[0]), rows[0].num_inputs or 1
    if found.keys().isdisjoint(names):
        return {}
    inputs, outputs = _sizes(rows[0])
    rank, whole = said.rank_of(module), outputs * rows[0].places["hf"].parts

    def take(name: str, *shape: int) -> np.ndarray:
        return read_floats(source, found.pop(name, None), name, shape)

    norms = None
    if _is_table(rows[0]):  # it multiplies rows from the left
        b, a = take(names[0], rank, whole).T, take(names[1], inputs, rank).T
    else:
        a, b = take(names[0], rank, inputs), take(names[1], whole, rank)
        norms = take(names[2], whole) if said.has_norms else None

    def part(array: np.ndarray, i: int, row: Tensor) -> np.ndarray:
        """Returns the outputs of one part, with the padding of a vocabulary."""
        here = np.split(array, len(rows))[i].reshape(*row.stored_shape[:-n], *array.shape[1:])
        return copy(here, array.dtype, (*row.shape[:-n], *array.shape[1:]))

    return {
        row.path: Change(
            a.reshape(rank, *row.shape[-n:]),
            part(b, i, row),
            said.scale_of(module),
            None if norms is None else part(norms, i, row),
        )
        for i, row in enumerate(rows)
    }


def _is_table(row: Tensor) -> bool:
    """Whether a matrix is looked up in; the output head is a linear map."""
    return row.path[-1] == "embedding" and row.path != _HEAD


def _module_name(row: Tensor) -> str:
    return row.hf_name.removesuffix(".weight")


def _names(row: Tensor) -> tuple[str, str, str]:
    """Returns what PEFT calls the parts of the adapter of a matrix: A, B and the norms."""
    start = f"{_PREFIX}{_module_name(row)}.lora_"
    if _is_table(row):
        return f"{start}embedding_A", f"{start}embedding_B", f"{start}magnitude_vector"
    return f"{start}A.weight", f"{start}B.weight", f"{start}magnitude_vector"


def _groups(config: ModelConfig) -> dict[str, list[Tensor]]:
    """Returns rows by transformers' names, those together that are parts of one tensor."""
    groups: dict[str, list[Tensor]] = {}
    for row in tensors(config):
        groups.setdefault(row.hf_name, []).append(row)
    return groups


def _sizes(row: Tensor) -> tuple[int, int]:
    """Returns how many inputs and how many outputs a matrix has."""
    n = row.num_inputs or 1
    return math.prod(row.stored_shape[-n:]), math.prod(row.stored_shape[:-n])


def _joined(parts: list[tuple[Tensor, LowRank]], rank: int) -> dict[str, np.ndarray]:
    """Returns PEFT's tensors of a kernel whose parts may have adapters of their own.

    These are joined: [A_q; A_v] and [B_q 0; 0 0; 0 B_v]: their ranks add up.
    """
    inputs, outputs = _sizes(parts[0][0])
    a = np.zeros((rank, inputs), np.float32)
    b = np.zeros((outputs * parts[0][0].places["hf"].parts, rank), np.float32)
    start = 0
    for row, leaf in parts:
        r, place = leaf.b.shape[-1], row.places["hf"]
        a[start : start + r] = to_host(leaf.a.reshape(r, -1))
        here = slice(place.part * outputs, (place.part + 1) * outputs)
        b[here, start : start + r] = to_host(leaf.b.reshape(-1, r))
        start += r
    name_a, name_b, _ = _names(parts[0][0])
    return {name_a: a, name_b: b}


def _module(row: Tensor, config: ModelConfig) -> str:
    """Returns what PEFT is to call a kernel in every layer."""
    words = _module_name(row).split(".")
    return ".".join(words[-config.family.adapter_words :])
