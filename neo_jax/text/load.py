"""`neo_jax.load(...)`: from the name of a model to a `LanguageModel`."""

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from neo_jax.checkpoints import adapter_files, hub
from neo_jax.checkpoints.load import cached_dtype, compute_dtype, lay_out, load_model
from neo_jax.checkpoints.options import LoadOptions
from neo_jax.devices import probe
from neo_jax.devices.compilation_cache import enable_compilation_cache
from neo_jax.errors import NeoError, brief
from neo_jax.fields import takes
from neo_jax.model.soft_prompt import PROMPT
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import Sharding, make_sharding
from neo_jax.text import defaults
from neo_jax.text.defaults import read_defaults
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.options import check_names, names
from neo_jax.text.tokenizer import Tokenizer, find_tokenizer, has_tokenizer, load_tokenizer


@takes(LoadOptions)
def load(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
    sharding: Sharding | None = None,
    **options: Any,
) -> LanguageModel:
    """Loads a checkpoint in Hugging Face's format.

    Where it is an adapter in PEFT's format, the model that it names is loaded, and the adapter
    merged into it; a soft prompt is read before every text that is generated or scored.

    Args:
      model: a folder, also gs://bucket/folder; a hub name such as "EleutherAI/gpt-neo-1.3B"; or
        None for the bundled model.
      revision: of the hub repository: a branch, tag or commit.
      token: for gated or private repositories; else HF_TOKEN or the stored login is used.
      tokenizer: in the place of the checkpoint's: one, its folder or file, or a model's name.
      sharding: a strategy in the place of mesh and rules.
      dtype: "float32", "bfloat16", "float16" for GPUs that lack it, such as a T4, or "auto":
        float32 on CPUs, else the one of the others that the device multiplies. A dtype, such as
        jnp.bfloat16, is taken too.
      quantize: "int8" rounds kernels and the table of tokens to 8-bit integers, one after another
        as they are read; an adapter is merged first, for which the whole model is held as it is
        stored.
      cache_dtype: of the keys and values of a sequence being generated: "float32", "bfloat16",
        "float16", "int8", or "auto" for `dtype`, on CPUs for float32, in which they attend.
      kernel: the attention implementation: "auto", "dense", "blocked", "splash" (TPUs) or "cudnn".
      mesh: how to split the model, as in "fsdp=4,model=2"; empty for one device.
      rules: how the mesh splits it, "tensor" or "embed:fsdp,heads:model"; see
        `neo_jax.sharding.rules`. Empty is "decode", as far as the mesh has its axes.
      **options: these six; `neo_jax.checkpoints.options.LoadOptions` declares them.

    Raises:
      NeoError: whatever is wrong with the name, the files or the mesh, in one line.
    """
    check_names(options, names(LoadOptions))
    enable_compilation_cache()
    probe.start()
    if not isinstance(sharding, Sharding | None):
        raise NeoError(f"sharding is what `make_sharding` returns, not {brief(sharding)}.")
    for name in options.keys() & {"dtype", "cache_dtype"}:
        if not isinstance(options[name], str):
            with contextlib.suppress(TypeError):  # for LoadOptions to refuse
                options[name] = np.dtype(options[name]).name
    chosen = LoadOptions(**options)
    sharding = sharding or make_sharding(chosen.mesh, chosen.rules, default="decode")
    folder = hub.resolve(model, revision=revision or None, token=token)
    base = adapter_files.base_folder(folder, token=token)
    compute, cached = compute_dtype(chosen.dtype), cached_dtype(chosen.cache_dtype)
    config, params = load_model(folder, base, compute, sharding, chosen.quantize)
    params = lay_out(config, params)
    said, config = read_defaults(folder if (folder / defaults.FILE).is_file() else base, config)
    found = _find_tokenizer(tokenizer, folder, base, config.vocab_size)
    count = len(params.get(PROMPT, ()))
    model = Neo(
        config, compute, chosen.kernel, sharding,
        cache_dtype=cached, virtual_tokens=count, soft_prompt=count,
    )  # fmt: skip
    return LanguageModel(model, params, found, folder, said)


def _find_tokenizer(
    named: Tokenizer | str | os.PathLike[str] | None, folder: Path, base: Path, vocab_size: int
) -> Tokenizer | None:
    """Returns the tokenizer that is named, else that of an adapter or of its model."""
    if named is None or named == "":
        home = folder if has_tokenizer(folder) else base
        return load_tokenizer(home) if has_tokenizer(home) else None
    tokenizer = find_tokenizer(named) if isinstance(named, str | os.PathLike) else named
    if tokenizer.vocab_size > vocab_size:
        raise NeoError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}; name the "
            "one that the model was trained with."
        )
    return tokenizer
