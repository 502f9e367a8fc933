"""Checkpoints of int8 weights: a folder like others, whose config.json says so.

Tensors have the names of the canonical tree, joined by dots, and lie as there; beside one of whole
numbers is its scale, NAME_scale. What reads other checkpoints refuses these.
"""

import contextlib
import dataclasses
import os
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.formats import StoredTensor, open_weights
from neo_jax.checkpoints.host_device import copy, shard, to_host
from neo_jax.checkpoints.save import write_rows
from neo_jax.config import ModelConfig
from neo_jax.devices import processes
from neo_jax.errors import NeoError
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file, make_path
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.ops.int8 import Int8
from neo_jax.sharding.rules import Sharding
from neo_jax.transforms.quantize import is_rounded, quantized_shapes

MARK = "quantization_config"
METHOD = {"quant_method": "neo_jax_int8"}

_SHARD_BYTES = 5_000_000_000


def is_int8(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds int8 weights of this package.

    Raises:
      NeoError: its config.json cannot be read.
    """
    path = make_path(folder) / "config.json"
    return is_file(path) and read_json(path).get(MARK) == METHOD


def read_int8_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config.json of a folder of int8 weights.

    Raises:
      NeoError: it is damaged, or describes another architecture.
    """
    path = make_path(folder) / "config.json"
    fields = read_json(path)
    fields.pop(MARK, None)
    return ModelConfig.from_hf(fields, source=str(path))


@dataclasses.dataclass(frozen=True)
class _Row:
    """A tensor on its way to a file, as it lies in the tree."""

    name: str
    array: Array

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def size(self) -> int:
        return self.array.size

    @property
    def num_bytes(self) -> int:
        return self.array.nbytes

    def stored(self) -> np.ndarray:
        return np.ascontiguousarray(to_host(self.array))


def save_int8(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Writes what `load` reads back exactly; the host holds one tensor at a time.

    Where `params` lie on several processes, all of them call this, and the first writes.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      params: what `neo_jax.transforms.quantize.quantize` returned.
      tokenizer: anything with `save(folder)`, or None.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: weights are not int8, or the folder cannot be written.
    """
    leaves, rows = flatten_dict(params), []
    for tensor in tensors(config):
        leaf, name = leaves[tensor.path], ".".join(tensor.path)
        if is_rounded(tensor) != isinstance(leaf, Int8):
            raise NeoError(f"{name} is no int8 weight; save the model as floats, or quantize it.")
        if isinstance(leaf, Int8):
            rows.append(_Row(f"{name}_scale", leaf.scale))
            leaf = leaf.values
        rows.append(_Row(name, leaf))
    rows.sort(key=lambda row: -row.dtype.itemsize)  # for alignment
    if all(row.array.is_fully_addressable for row in rows) or processes.is_leader():
        fields = {**config.to_hf(), MARK: METHOD}
        write_rows(make_path(folder), fields, rows, tokenizer, max_shard_bytes)
    else:
        for row in rows:
            to_host(row.array)  # has a part in it


def load_int8(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> Params:
    """Reads what `save_int8` wrote, a tensor at a time.

    Args:
      folder: of int8 weights.
      config: what `read_int8_config` returned.
      dtype: of what is no int8 weight.
      sharding: a strategy; every process then copies only what its devices hold.

    Raises:
      NeoError: files are missing or damaged, or hold other tensors than `config` describes.
    """
    leaves, kinds = {}, flatten_dict(quantized_shapes(config, dtype, sharding))
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)
        found = dict(weights.tensors)

        def read(name: str, like: jax.ShapeDtypeStruct) -> Array:
            stored = found.pop(name, None)
            if stored is None or stored.shape != like.shape or not _fits(stored, like):
                what = "lacks it" if stored is None else f"has {stored.dtype} {list(stored.shape)}"
                raise NeoError(
                    f"{weights.source}: config.json asks for {name}, {like.dtype} "
                    f"{list(like.shape)}, and the file {what}; is config.json of the same model?"
                )
            finite = "" if like.dtype == np.int8 else f"{stored.path}: {name}"
            if like.sharding is None:
                array = jax.device_put(copy(stored.view(), like.dtype, like.shape, finite))
            else:
                array = shard(stored.view(), like.dtype, like.shape, like.sharding, finite)
            return jax.block_until_ready(array)

        for tensor in tensors(config):
            leaves[tensor.path] = _read_one(tensor, kinds[tensor.path], read)
    if found:
        raise NeoError(
            f"{weights.source} holds {len(found)} tensors that a model of this config.json has "
            f"not, the first {next(iter(found))}; is config.json of the same model?"
        )
    return unflatten_dict(leaves)


def _read_one(tensor: Tensor, like: Any, read: Any) -> Int8 | Array:
    name = ".".join(tensor.path)
    if isinstance(like, Int8):
        return Int8(read(name, like.values), read(f"{name}_scale", like.scale))
    return read(name, like)


def _fits(stored: StoredTensor, like: jax.ShapeDtypeStruct) -> bool:
    return (stored.dtype == "int8") == (like.dtype == np.int8)
