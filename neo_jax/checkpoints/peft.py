"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from neo_jax.axes import Params
from neo_jax.checkpoints import hub
from neo_jax.checkpoints.formats import FLOATS, StoredTensor, open_file
from neo_jax.checkpoints.host_device import copy
from neo_jax.config import ModelConfig
from neo_jax.devices.processes import is_leader, to_host
from neo_jax.errors import NeoError, brief, checked, reason
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file, make_path, write_whole
from neo_jax.model.low_rank import LowRank
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.transforms.lora import LoraConfig, add_adapters, merge

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Fields that do not change what an adapter computes, or that the tensors say again.
_NEUTRAL = frozenset(
    """
    peft_type peft_version task_type auto_mapping base_model_name_or_path revision inference_mode r
    lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out megatron_core qalora_group_size ensure_weight_tying runtime_config eva_config
    """.split()
)
# What else a field may say: that it is off; and ways to draw a and b that leave the weight alone.
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
_DRAWS = (True, "gaussian", "orthogonal", "eva")

_MOST_RANK = 1 << 20


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
        for rows in _kernels(config)
    ]
    rank = lora.rank * max(map(len, adapted))
    arrays: dict[str, np.ndarray] = {}
    for parts in filter(None, adapted):
        arrays |= _joined(parts, rank)
    if not is_leader():
        return
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub.PUBLISHED.get(base.lower(), base),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({_module(parts[0][0], config) for parts in adapted if parts}),
        "bias": "none",
        "fan_in_fan_out": config.family.transposed,
        "modules_to_save": None,
    }
    place = make_path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            tokenizer.save(place)
        write_whole(place / WEIGHTS, save(arrays, {"format": "pt"}))
        write_whole(place / CONFIG, json.dumps(fields, indent=2) + "\n")
    except OSError as error:
        raise NeoError(f"cannot save to {folder}: {reason(error)}.") from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return is_file(folder / CONFIG) and not is_file(folder / "config.json")


def describe_adapter(folder: Path) -> dict[str, Any]:
    """Returns what an adapter is, by name, without reading its weights or its model.

    Raises:
      NeoError: see `load_adapter`.
    """
    fields = _read_config(folder / CONFIG)
    with contextlib.ExitStack() as files:
        found = open_file(folder / WEIGHTS, files).values()
        parameters = sum(math.prod(stored.shape) for stored in found)
        dtypes = sorted({stored.dtype for stored in found})
    return {
        "adapter": str(folder),
        "base_model": fields.get("base_model_name_or_path"),
        "rank": fields["r"],
        "alpha": fields["lora_alpha"],
        "targets": fields["target_modules"],
        "parameters": parameters,
        "dtype": "+".join(dtypes),
    }


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


def load_adapter(
    folder: str | os.PathLike[str], config: ModelConfig
) -> tuple[dict[str, Any], float]:
    """Reads adapters; returns their canonical tree of float32 arrays on the host, and their scale.

    Args:
      folder: holds adapter_config.json and adapter_model.safetensors.
      config: of the model that they are for.

    Raises:
      NeoError: files are missing or damaged, are for another model, or say what is not supported;
        the message names the file, and the field or tensor.
    """
    path = make_path(folder)
    fields = _read_config(path / CONFIG)
    rank, scale = fields["r"], fields["lora_alpha"] / fields["r"]
    with contextlib.ExitStack() as files:
        found = open_file(path / WEIGHTS, files)
        leaves = {}
        for rows in _kernels(config):
            names = {part: _name(rows[0], part) for part in "AB"}
            if found.keys().isdisjoint(names.values()):
                continue
            inputs, outputs = _sizes(rows[0])
            whole = outputs * rows[0].places["hf"].parts
            a = _read(path, found.pop(names["A"], None), names["A"], (rank, inputs))
            b = _read(path, found.pop(names["B"], None), names["B"], (whole, rank))
            for row, part in zip(rows, np.split(b, len(rows)), strict=True):
                leaves[*row.path, "a"] = a.reshape(rank, *row.shape[-row.num_inputs :])
                leaves[*row.path, "b"] = part.reshape(*row.shape[: -row.num_inputs], rank)
    if found or not leaves:
        what = f"the tensor {next(iter(found))}" if found else "no tensors"
        raise NeoError(
            f"{path / WEIGHTS} holds {what}; this loads plain LoRA of the linear maps of a layer."
        )
    return unflatten_dict(leaves), scale


def apply_adapter(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    shardings: Params | None = None,
) -> Params:
    """Returns canonical parameters with adapters merged into them, of the dtypes that they had.

    Args:
      folder: of the adapters.
      config: describes `params`.
      params: the model that they are for; consumed.
      shardings: a tree like `params`, where each array is to live.

    Raises:
      NeoError: see `load_adapter`.
    """
    adapters, scale = load_adapter(folder, config)

    def apply(params: Params, adapters: Params) -> Params:
        merged = merge(add_adapters(params, adapters, scale))
        return jax.tree.map(lambda new, old: new.astype(old.dtype), merged, params)

    return jax.jit(apply, out_shardings=shardings, donate_argnums=0)(params, adapters)


def _kernels(config: ModelConfig) -> list[list[Tensor]]:
    """Returns the rows of kernels, those together that are parts of one tensor."""
    groups: dict[str, list[Tensor]] = {}
    for row in tensors(config):
        if row.num_inputs:
            groups.setdefault(row.hf_name, []).append(row)
    return list(groups.values())


def _sizes(row: Tensor) -> tuple[int, int]:
    """Returns how many inputs and how many outputs a kernel has."""
    return math.prod(row.shape[-row.num_inputs :]), math.prod(row.shape[: -row.num_inputs])


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
    return {_name(parts[0][0], "A"): a, _name(parts[0][0], "B"): b}


def _module(row: Tensor, config: ModelConfig) -> str:
    """Returns what PEFT is to call a kernel in every layer."""
    words = row.hf_name.removesuffix(".weight").split(".")
    return ".".join(words[-config.family.adapter_words :])


def _name(row: Tensor, part: str) -> str:
    """Returns what PEFT calls a part, "A" or "B", of the adapter of a kernel."""
    return f"base_model.model.{row.hf_name.removesuffix('.weight')}.lora_{part}.weight"


def _read_config(path: Path) -> dict[str, Any]:
    """Returns a config whose rank and alpha are numbers, and which describes plain LoRA."""
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise NeoError(f"{path}: peft_type is {brief(fields.get('peft_type'))}; this loads 'LORA'.")
    for name, value in fields.items():
        fine = _OFF + _DRAWS if name == "init_lora_weights" else _OFF
        if name not in _NEUTRAL and value not in fine:
            raise NeoError(
                f"{path}: {name} is {brief(value)}, which is not supported; merge the adapter into "
                "its model with PEFT's merge_and_unload, and load that."
            )
    try:
        rank, alpha = checked("r", fields.get("r"), int), fields.get("lora_alpha")
        is_finite = math.isfinite(checked("lora_alpha", alpha, float))
    except NeoError as error:
        raise NeoError(f"{path}: {error}") from error
    if not 1 <= rank <= _MOST_RANK or not is_finite:
        raise NeoError(
            f"{path}: r {brief(rank)} must lie between 1 and {_MOST_RANK:,}, and lora_alpha "
            f"{brief(alpha)} be finite."
        )
    targets = fields.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise NeoError(f"{path}: target_modules are {brief(targets)}, not names of kernels.")
    return fields | {"target_modules": sorted(names)}


def _read(
    folder: Path, stored: StoredTensor | None, name: str, shape: tuple[int, int]
) -> np.ndarray:
    if stored is None:
        raise NeoError(f"{folder / WEIGHTS} lacks {name}; copy it again.")
    if stored.shape != shape or stored.dtype not in FLOATS:
        raise NeoError(
            f"{folder / WEIGHTS}: {name} is {stored.dtype} {list(stored.shape)}, not of floats "
            f"{list(shape)}; is the adapter for this model?"
        )
    return copy(stored.view(), np.dtype(np.float32), shape, f"{folder / WEIGHTS}: {name}")
