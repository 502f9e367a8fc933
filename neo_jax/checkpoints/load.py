"""From a folder to parameters on their devices: floats, adapters, int8 weights."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.adapter_files import adapter_kind
from neo_jax.checkpoints.formats import StoredTensor, open_weights
from neo_jax.checkpoints.host_device import copy, float_dtype, shard
from neo_jax.checkpoints.open_model import match, open_model
from neo_jax.checkpoints.options import Quantize
from neo_jax.checkpoints.peft import apply_adapter, load_adapter
from neo_jax.checkpoints.prefix_mapper import KIND, load_mapper
from neo_jax.checkpoints.prompt_tuning import KINDS, load_soft_prompt
from neo_jax.checkpoints.save import groups
from neo_jax.config import ModelConfig
from neo_jax.devices import probe
from neo_jax.errors import NeoError
from neo_jax.files.paths import make_path
from neo_jax.model.prefix_mapper import MAPPER
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.tensor_table import Tensor, tensors
from neo_jax.ops.tuning import tpu_layout
from neo_jax.sharding.rules import Sharding
from neo_jax.transforms.quantize import quantize, quantize_one, quantized_shapes

_BATCH_BYTES = 64 << 20  # tensors travel to the devices together up to this size


def load_model(
    folder: Path,
    base: Path,
    dtype: np.dtype,
    sharding: Sharding | None,
    quantization: Quantize,
) -> tuple[ModelConfig, Params]:
    """Reads a model, and merges into it the adapter in `folder`, if `base` is another.

    A soft prompt and a mapper do not merge: they are next to the model, as `PROMPT` and `MAPPER`.

    Args:
      folder: what `neo_jax.checkpoints.hub.resolve` returned.
      base: of the model, see `neo_jax.checkpoints.adapter_files.base_folder`.
      dtype: of the parameters that are floats.
      sharding: where they go.
      quantization: what kernels and tables of tokens are rounded to; what is stored as int8 stays.

    Raises:
      NeoError: files are missing, damaged, or not of one model.
    """
    kind = adapter_kind(folder) if base != folder else None
    if kind in (*KINDS, KIND):
        config, params = load_model(base, base, dtype, sharding, quantization)
        place = sharding.named((), ()) if sharding else None
        if kind == KIND:
            return config, {**params, MAPPER: jax.device_put(load_mapper(folder, config), place)}
        return config, {**params, PROMPT: jax.device_put(load_soft_prompt(folder, config), place)}
    config, is_int8 = open_model(base)
    if is_int8 and base != folder:
        raise NeoError(
            f"{base} holds int8 weights, into which no adapter merges; name in {folder} the "
            "model of floats that they were made of, and give --quantize int8."
        )
    if is_int8:
        return config, load_int8(base, config, dtype, sharding)
    adapter = load_adapter(folder, config) if base != folder else None
    shardings = None
    if sharding:
        rows = tensors(adapter.config if adapter else config)
        places = {t.path: sharding.named(t.axes, t.shape, "/".join(t.path)) for t in rows}
        shardings = unflatten_dict(places)
    read = functools.partial(load_params, base, config, shardings=shardings)
    if quantization == "int8" and not adapter:
        each = functools.partial(quantize_one, dtype=dtype, sharding=sharding)
        return config, read(each=each)
    params = read(dtype=None if quantization == "int8" else dtype)
    if adapter:
        config, params = adapter.config, apply_adapter(adapter, params, shardings)
    if quantization == "int8":
        params = quantize(config, params, dtype, sharding)
    return config, params


def load_params(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Params | None = None,
    each: Callable[[Tensor, Array], Any] | None = None,
) -> Params:
    """Reads weights of floats into the canonical parameter tree.

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
        numbers that are not finite; the message names the file, the tensor and the fix.
    """
    cast_to = None if dtype is None else float_dtype(dtype)
    placement = {} if shardings is None else flatten_dict(shardings)
    params = {}
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)
        found = match(config, weights)
        rows = [
            _Row(
                stored,
                functools.partial(tensor.of, weights.form),
                jax.ShapeDtypeStruct(
                    tensor.shape,
                    cast_to or float_dtype(stored.dtype),
                    sharding=placement.get(tensor.path),
                ),
            )
            for tensor, stored in found
        ]
        for (tensor, _), array in zip(found, _read(rows), strict=True):
            params[tensor.path] = each(tensor, array) if each else array
    return unflatten_dict(params)


def load_int8(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    dtype: DTypeLike,
    sharding: Sharding | None = None,
) -> Params:
    """Reads what `save_pretrained` wrote of a quantized model.

    Args:
      folder: of int8 weights.
      config: what `open_model` returned.
      dtype: of what is no int8 weight.
      sharding: a strategy; every process then copies only what its devices hold.

    Raises:
      NeoError: files are missing or damaged, or hold other tensors than `config` describes.
    """
    shapes = quantized_shapes(config, dtype, sharding)
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)
        left, rows = dict(weights.tensors), []
        for path, like in leaves:
            name = ".".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
            name += "_scale" if getattr(path[-1], "name", "") == "scale" else ""
            stored = left.pop(name, None)
            fits = stored and (stored.dtype == "int8") == (like.dtype == np.int8)
            if stored is None or stored.shape != like.shape or not fits:
                what = "lacks it" if stored is None else f"has {stored.dtype} {list(stored.shape)}"
                raise NeoError(
                    f"{weights.source}: config.json asks for {name}, {like.dtype} "
                    f"{list(like.shape)}, and the file {what}; is config.json of the same model?"
                )
            rows.append(_Row(stored, np.asarray, like))
        if left:
            raise NeoError(
                f"{weights.source} holds {len(left)} tensors that a model of this config.json has "
                f"not, the first {next(iter(left))}; is config.json of the same model?"
            )
        return jax.tree.unflatten(structure, _read(rows))


class _Row(NamedTuple):
    """A tensor on its way to the devices."""

    stored: StoredTensor
    of: Callable[[np.ndarray], np.ndarray]  # gives a view as it is laid out here
    like: jax.ShapeDtypeStruct  # of the array; without a sharding it goes to the default device


def _read(rows: Iterable[_Row]) -> Iterator[Array]:
    """Yields arrays in order, some at a time; numbers that are not finite are refused."""
    for batch in groups(rows, lambda row: row.stored.num_bytes, _BATCH_BYTES):
        arrays: list[Array] = []
        for stored, of, like in batch:
            finite = "" if like.dtype == np.int8 else f"{stored.path}: {stored.name}"
            view = of(stored.view())
            if like.sharding is None:
                arrays.append(jax.device_put(copy(view, like.dtype, like.shape, finite)))
            else:
                arrays.append(shard(view, like.dtype, like.shape, like.sharding, finite))
        # Transfers are asynchronous: without a wait, copies of the whole model could queue up.
        yield from jax.block_until_ready(arrays)


def lay_out(config: ModelConfig, params: Params) -> Params:
    """Gives parameters the order of axes in which their devices read them best; consumes them."""

    def put(array: Array, tensor: Tensor) -> Array:
        place = tpu_layout(array.sharding, tensor.axes[: array.ndim])
        return array if place is array.sharding else jax.device_put(array, place, donate=True)

    leaves = flatten_dict(params)
    for tensor in tensors(config):
        leaves[tensor.path] = jax.tree.map(lambda x, t=tensor: put(x, t), leaves[tensor.path])
    return unflatten_dict(leaves)


def compute_dtype(name: str) -> np.dtype:
    """Returns the dtype of products that `load` means by a name."""
    return probe.fast_dtype() if name == "auto" else jnp.dtype(name)


def cached_dtype(name: str, device: jax.Device | None = None) -> np.dtype | None:
    """Returns the dtype of keys and values that `load` means by a name; None for that of products.

    "auto" is what suits a device, by default those of this process.
    """
    return probe.fast_cache_dtype(device) if name == "auto" else jnp.dtype(name)
