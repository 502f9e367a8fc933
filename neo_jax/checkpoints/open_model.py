"""Checkpoints: reading them into shards, writing them.

A checkpoint is a folder with config.json and weights, in any format of
`neo_jax.checkpoints.formats`; what is written is Hugging Face's, in safetensors.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import VOCAB, Array, Params
from neo_jax.checkpoints import mesh_tf
from neo_jax.checkpoints.formats import FLOATS, StoredTensor, Weights, holds_form, open_weights
from neo_jax.checkpoints.host_device import check_finite, copy, float_dtype, shard, to_host
from neo_jax.checkpoints.save import Leaf, groups, write_model
from neo_jax.config import ModelConfig
from neo_jax.devices import processes
from neo_jax.errors import NeoError
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file, make_path
from neo_jax.model.tensor_table import Format, Tensor, tensors

# Buffers that old versions of transformers saved with every attention layer.
_STALE = re.compile(r"(^|\.)h\.\d+\.attn\.(attention\.)?(bias|masked_bias)$")

_HEAD = "lm_head.weight"
_TABLE = "transformer.wte.weight"

_BATCH_BYTES = 64 << 20  # tensors travel to the devices together up to this size


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config.json of a checkpoint.

    An output head that the weights hold counts, as in transformers, where config.json says that it
    is the table of tokens and the two differ.

    Raises:
      NeoError: it is missing, damaged, or describes another architecture; or the weights are
        damaged.
    """
    path = make_path(folder) / "config.json"
    if not is_file(path):
        raise NeoError(f"{folder} holds no config.json; name the folder of a checkpoint.")
    fields = read_json(path)
    if "n_vocab" in fields and "model_type" not in fields:
        return mesh_tf.read_model(fields, source=str(path))
    config = ModelConfig.from_hf(fields, source=str(path))
    untied = config.tied_head and _has_own_head(path.parent)
    return dataclasses.replace(config, tied_head=False) if untied else config


def _has_own_head(folder: Path) -> bool:
    """Whether weights hold an output head that differs from the table of tokens."""
    if not holds_form(folder, "hf"):
        return False
    with contextlib.ExitStack() as files:
        stored = open_weights(folder, files).tensors
        found = [stored.get(_HEAD), stored.get(_TABLE) or stored.get(_TABLE.partition(".")[2])]
        pair = [tensor for tensor in found if tensor and tensor.dtype in FLOATS]
        if len(pair) < 2 or pair[0].shape != pair[1].shape:
            return False
        head, table = (tensor.view() for tensor in pair)
        is_one = head.ctypes.data == table.ctypes.data and head.strides == table.strides
        return not (is_one or np.array_equal(head, table))


def stored_dtypes(folder: str | os.PathLike[str], config: ModelConfig) -> list[str]:
    """Returns the names of the dtypes that the weights of a folder are stored in; reads headers."""
    with contextlib.ExitStack() as files:
        rows = _match(config, open_weights(make_path(folder), files))
    return sorted({stored.dtype for _, stored in rows})


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Params | None = None,
    each: Callable[[Tensor, Array], Any] | None = None,
) -> Params:
    """Reads the weights of a checkpoint into the canonical parameter tree.

    Tensors stream from a memory map, through a transposition, to the devices: beyond the result,
    the host holds about the largest of them. The arrays are copies, also on a CPU, where JAX could
    alias the map: a file that is overwritten later must not change a model that runs.

    Args:
      folder: what `resolve` returned.
      config: what `read_config` returned.
      dtype: a floating-point type for all parameters; None keeps the stored one. (float64 becomes
        float32 unless JAX has 64-bit types enabled.)
      shardings: a tree like the parameters with a `jax.sharding.Sharding` at each leaf; every
        process then copies only what its devices hold. None: the default device, uncommitted.
      each: what to make of each parameter as it comes to its devices; only that is kept.

    Raises:
      NeoError: files are missing or damaged, or hold other tensors than `config` describes, or
        numbers that are not finite; the message names the file, the tensor and the mend.
    """
    cast_to = None if dtype is None else float_dtype(dtype)
    placement = None if shardings is None else flatten_dict(shardings)
    params: dict[tuple[str, ...], Array] = {}
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)
        rows = _match(config, weights)
        for batch in groups(rows, lambda row: row[1].num_bytes, _BATCH_BYTES):
            views = [tensor.of(weights.form, stored.view()) for tensor, stored in batch]
            dtypes = [cast_to or float_dtype(view.dtype) for view in views]
            paths = [tensor.path for tensor, _ in batch]
            shapes = [tensor.shape for tensor, _ in batch]
            names = [f"{stored.path}: {stored.name}" for _, stored in batch]
            if placement is None:
                arrays = jax.device_put(list(map(copy, views, dtypes, shapes, names)))
            else:
                places = [placement[path] for path in paths]
                arrays = list(map(shard, views, dtypes, shapes, places, names))
            if each is not None:
                arrays = list(map(each, [tensor for tensor, _ in batch], arrays))
            # Transfers are asynchronous: without a wait, copies of the whole model could queue up.
            params.update(zip(paths, jax.block_until_ready(arrays), strict=True))
    return unflatten_dict(params)


def save_pretrained(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    params: Params,
    *,
    tokenizer: Any = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that this package and transformers read.

    Files are written aside and renamed when all are whole; weights that the folder held before
    are replaced. The host holds one tensor at a time. Where `params` lie on several processes, all
    of them call this: the first writes, and all return when the files are there.

    Args:
      folder: made where it does not exist.
      config: describes `params`.
      params: the canonical tree of arrays.
      tokenizer: anything with `save(folder)`, or None to leave the folder's tokenizer files alone.
      dtype: a floating-point type to store; None keeps that of each array.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: `params` is not what `config` describes, or the folder cannot be written.
    """
    leaves, arrays = flatten_dict(params), []
    readers: dict[tuple[str, ...], Leaf] = {}
    for tensor in tensors(config):
        leaf, name = leaves.pop(tensor.path, None), "/".join(tensor.path)
        if leaf is None:
            raise NeoError(f"params has no leaf {name}, which its config asks for.")
        if not isinstance(leaf, Array | np.ndarray):
            raise NeoError(f"{name} is a {type(leaf).__name__}; merge it into an array to save it.")
        if leaf.shape != tensor.shape:
            raise NeoError(f"{name} is {leaf.shape}, but its config asks for {tensor.shape}.")
        arrays.append(leaf)
        kind = float_dtype(leaf.dtype if dtype is None else dtype)
        readers[tensor.path] = Leaf(kind, functools.partial(to_host, leaf))
    if leaves:
        raise NeoError(f"params has a leaf {'/'.join(next(iter(leaves)))} that its config has not.")
    several = not all(getattr(array, "is_fully_addressable", True) for array in arrays)
    if several and not processes.is_leader():
        for array in arrays:
            to_host(array)  # has a part in it
    else:
        write_model(make_path(folder), config, readers, tokenizer, max_shard_bytes)
    if several:
        processes.barrier("saved")


def copy_pretrained(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    tokenizer: Any = None,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes what `save_pretrained` would write of a checkpoint, of any format, that is not loaded.

    Args:
      source: what `load_params` takes.
      folder: made where it does not exist.
      config: of the source.
      tokenizer: anything with `save(folder)`, or None.
      dtype: a floating-point type to store; None keeps the stored ones.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: as `load_params` and `save_pretrained`.
    """
    with stored_leaves(source, config) as leaves:
        if dtype is not None:
            kind = float_dtype(dtype)
            leaves = {path: Leaf(kind, leaf.read) for path, leaf in leaves.items()}
        write_model(make_path(folder), config, leaves, tokenizer, max_shard_bytes)


@contextlib.contextmanager
def stored_leaves(
    folder: str | os.PathLike[str], config: ModelConfig
) -> Iterator[dict[tuple[str, ...], Leaf]]:
    """Gives a checkpoint's parameters by their paths, to be read one at a time while it is open.

    Raises:
      NeoError: as `load_params`.
    """
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)

        def read(tensor: Tensor, stored: StoredTensor) -> np.ndarray:
            view = tensor.of(weights.form, stored.view())
            return check_finite(view, f"{stored.path}: {stored.name}")

        yield {
            tensor.path: Leaf(np.dtype(stored.dtype), functools.partial(read, tensor, stored))
            for tensor, stored in _match(config, weights)
        }


def _match(config: ModelConfig, weights: Weights) -> list[tuple[Tensor, StoredTensor]]:
    """Pairs every parameter with what is stored for it, and accounts for all that is stored."""
    form, source = weights.form, weights.source
    if config.num_layers > len(weights.tensors):  # before a table is made for so many
        raise NeoError(
            f"{source} holds {len(weights.tensors)} tensors, too few for num_layers "
            f"{config.num_layers}; is config.json of the same model?"
        )
    table = tensors(config)
    if form not in table[0].places:
        raise NeoError(f"{source}: a checkpoint of TensorFlow is read for GPT-Neo only.")
    stored = _canonical(table, weights)
    wanted = list(dict.fromkeys(tensor.places[form].name for tensor in table))
    missing = [name for name in wanted if name not in stored]
    if missing:
        raise NeoError(
            f"{source} lacks {len(missing)} of {len(wanted)} tensors, the first {missing[0]}; is "
            "config.json of the same model?"
        )
    known = set(wanted)
    unexpected = [tensor.name for name, tensor in stored.items() if name not in known]
    if unexpected:
        raise NeoError(
            f"{source} holds {len(unexpected)} tensors that a model of this config.json has not, "
            f"the first {unexpected[0]}; is config.json of the same model?"
        )
    rows = [(tensor, stored[tensor.places[form].name]) for tensor in table]
    for tensor, entry in rows:
        _check(entry, tensor, form)
    return rows


def _canonical(table: tuple[Tensor, ...], weights: Weights) -> dict[str, StoredTensor]:
    """Returns what is stored by the names of the table, without what is no parameter."""
    names = {tensor.places[weights.form].name for tensor in table if weights.form in tensor.places}
    if weights.form == "mesh_tf":
        # Beside a variable, as gpt2/wte/adam_m or gpt2/wte_slot_vr, are those of the optimizer.
        return {
            name: tensor
            for name, tensor in weights.tensors.items()
            if name != "global_step"
            and (name in names or not any(name.startswith((f"{n}/", f"{n}_")) for n in names))
        }
    prefix, head = ("transformer.", _HEAD) if weights.form == "hf" else ("transformer/", "lm_head/")
    stored: dict[str, StoredTensor] = {}
    for name, tensor in weights.tensors.items():
        if _STALE.search(name):
            continue
        full = name if name.startswith(head) else f"{prefix}{name.removeprefix(prefix)}"
        if full in stored:
            raise NeoError(
                f"{weights.source} holds both {name} and {stored[full].name}, which are one "
                "parameter; remove one of them."
            )
        stored[full] = tensor
    if _HEAD in stored and _HEAD not in names:
        _check(stored[_HEAD], table[0], "hf")
        # The two are one matrix; safetensors.torch.save_model keeps whichever sorts first.
        stored.setdefault(table[0].hf_name, stored.pop(_HEAD))
        stored.pop(_HEAD, None)
    return stored


def _check(stored: StoredTensor, tensor: Tensor, form: Format) -> None:
    expected, shape = tensor.places[form].whole, stored.shape
    if form == "mesh_tf" and tensor.axes[0] == VOCAB and shape and shape[0] > expected[0]:
        shape = (expected[0], *shape[1:])  # rows beyond the vocabulary, for its mesh to divide
    if shape != expected:
        raise NeoError(
            f"{stored.path}: {stored.name} is {list(stored.shape)}, but config.json asks for "
            f"{list(expected)}; is config.json of the same model?"
        )
    if stored.dtype not in FLOATS:
        raise NeoError(
            f"{stored.path}: {stored.name} is stored as {stored.dtype}; save the checkpoint as one "
            f"of {', '.join(FLOATS)}."
        )
