"""From a folder to parameters: floats, adapters, int8 weights."""

import functools
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from neo_jax.adapters import apply_adapter
from neo_jax.axes import Params
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.int8_checkpoint import is_int8, load_int8, read_int8_config
from neo_jax.names import tensors
from neo_jax.pretrained import load_params, read_config
from neo_jax.quantize import Quantization, quantize, quantize_one
from neo_jax.sharding import Sharding


def read_model(
    folder: Path,
    base: Path,
    dtype: np.dtype,
    sharding: Sharding | None,
    quantization: Quantization,
) -> tuple[ModelConfig, Params]:
    """Reads a model, and merges into it the adapter in `folder`, if `base` is another.

    Args:
      folder: what `neo_jax.hub.resolve` returned.
      base: of the model, see `neo_jax.adapters.base_folder`.
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
        table = tensors(config)
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
