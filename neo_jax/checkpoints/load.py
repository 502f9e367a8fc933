"""From a folder to parameters: floats, adapters, int8 weights."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax.axes import Array, Params
from neo_jax.checkpoints.int8_folder import is_int8, load_int8, read_int8_config
from neo_jax.checkpoints.open_model import load_params, read_config
from neo_jax.checkpoints.peft import apply_adapter
from neo_jax.config import ModelConfig
from neo_jax.devices import probe
from neo_jax.errors import NeoError, suggest
from neo_jax.model import tensor_table
from neo_jax.ops.tuning import tpu_layout
from neo_jax.sharding.rules import Sharding
from neo_jax.transforms.quantize import Quantization, quantize, quantize_one

CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")


def read_model(
    folder: Path,
    base: Path,
    dtype: np.dtype,
    sharding: Sharding | None,
    quantization: Quantization,
) -> tuple[ModelConfig, Params]:
    """Reads a model, and merges into it the adapter in `folder`, if `base` is another.

    Args:
      folder: what `neo_jax.checkpoints.hub.resolve` returned.
      base: of the model, see `neo_jax.checkpoints.peft.base_folder`.
      dtype: of the parameters that are floats.
      sharding: where they go.
      quantization: what kernels and tables of tokens are rounded to; what is stored as int8 stays.

    Raises:
      NeoError: files are missing, damaged, or not of one model.
    """
    if is_int8(base):
        if base != folder:
            raise NeoError(
                f"{base} holds int8 weights, into which no adapter merges; name in {folder} the "
                "model of floats that they were made of, and give --quantize int8."
            )
        config = read_int8_config(base)
        return config, load_int8(base, config, dtype, sharding)
    config = read_config(base)
    shardings = None
    if sharding:
        table = tensor_table.tensors(config)
        shardings = unflatten_dict(
            {t.path: sharding.named(t.axes, t.shape, "/".join(t.path)) for t in table}
        )
    read = functools.partial(load_params, base, config, shardings=shardings)
    if quantization == "int8" and base == folder:
        each = functools.partial(quantize_one, dtype=dtype, sharding=sharding)
        return config, read(each=each)
    params = read(dtype=None if quantization == "int8" else dtype)
    if base != folder:
        params = apply_adapter(folder, config, params, shardings)
    if quantization == "int8":
        params = quantize(config, params, dtype, sharding)
    return config, params


def lay_out(config: ModelConfig, params: Params) -> Params:
    """Gives parameters the order of axes in which their devices read them best; consumes them."""

    def put(array: Array, tensor: tensor_table.Tensor) -> Array:
        place = tpu_layout(array.sharding, tensor.axes[: array.ndim])
        return array if place is array.sharding else jax.device_put(array, place, donate=True)

    leaves = flatten_dict(params)
    for tensor in tensor_table.tensors(config):
        leaves[tensor.path] = jax.tree.map(lambda x, t=tensor: put(x, t), leaves[tensor.path])
    return unflatten_dict(leaves)


def compute_dtype(name: str) -> np.dtype:
    """Returns the dtype of products that `load` means by a name.

    Raises:
      NeoError: no dtype of this name.
    """
    if name == "auto":
        return probe.fast_dtype()
    if name not in ("float32", "bfloat16"):
        raise NeoError(f"dtype '{name}' is not one of auto, float32, bfloat16.")
    return jnp.dtype(name)


def cached_dtype(name: str, device: jax.Device | None = None) -> np.dtype | None:
    """Returns the dtype of keys and values that `load` means by a name; None for that of products.

    "auto" is what suits a device, by default those of this process.

    Raises:
      NeoError: no dtype of this name.
    """
    if name not in CACHE_DTYPES:
        raise NeoError(f"no cache is of '{name}'.{suggest(name, CACHE_DTYPES)}")
    if name == "auto":
        return probe.fast_cache_dtype(device)
    return jnp.dtype(name)
