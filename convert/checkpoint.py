"""A checkpoint of any format to a folder of Hugging Face's or a run, with proof of no change."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from neo_jax.axes import Array, Params
from neo_jax.checkpoints import hub
from neo_jax.checkpoints.host_device import copy, float_dtype
from neo_jax.checkpoints.load import load_params
from neo_jax.checkpoints.open_model import read_config, stored_leaves
from neo_jax.checkpoints.save import Leaf, new_folder, write_model
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError
from neo_jax.files.paths import is_remote, make_path
from neo_jax.model.heads import classify_sequences, classify_tokens
from neo_jax.model.scan import stack, unstack
from neo_jax.model.tensor_table import tensors
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import find_tokenizer, has_tokenizer, load_tokenizer
from neo_jax.training.checkpoint import Checkpoints
from neo_jax.training.config import TrainConfig
from neo_jax.training.initial_state import find_pretrained
from neo_jax.training.optimizer import make_optimizer
from neo_jax.training.snapshot import find_checkpoint, read_model, read_params
from neo_jax.training.step import abstract_state, state_of

Leaves = dict[tuple[str, ...], Leaf]


class Source(NamedTuple):
    """An open checkpoint."""

    name: str
    config: ModelConfig
    leaves: Leaves
    tokenizer: Any  # or None


class Verified(NamedTuple):
    """What was found in reading back what was written."""

    tensors: int
    parameters: int
    num_bytes: int
    largest_difference: float  # between a stored number and its source: rounding
    logits: str  # how they compare with those of transformers


@contextlib.contextmanager
def open_source(name: str, revision: str | None = None, tokenizer: str = "") -> Iterator[Source]:
    """Opens a checkpoint: a folder of any format, a hub name, or a run of `neo-jax train`.

    Raises:
      NeoError: it cannot be found or read.
    """
    folder = make_path(name) if is_remote(name) else Path(name).expanduser()
    found = find_checkpoint(folder) if folder.is_dir() else None
    if found is not None and not (folder / "config.json").is_file():
        config, data = read_model(found)
        arrays = flatten_dict(read_params(found, config))
        leaves = {path: Leaf(leaf.dtype, lambda leaf=leaf: leaf) for path, leaf in arrays.items()}
        yield Source(str(found), config, leaves, _tokenizer(tokenizer, Path(data).expanduser()))
        return
    folder = hub.resolve(name, revision=revision)
    config = read_config(folder)
    with stored_leaves(folder, config) as leaves:
        yield Source(str(folder), config, leaves, _tokenizer(tokenizer, folder))


def _tokenizer(named: str, folder: Path) -> Any:
    if named:
        return find_tokenizer(named)
    return load_tokenizer(folder) if has_tokenizer(folder) else None


def convert(source: Source, output: str, dtype: str = "", max_shard_bytes: int = 5 * 10**9) -> Path:
    """Writes a folder that `neo_jax.load`, `train --pretrained` and transformers read.

    Args:
      source: what `open_source` gave.
      output: the folder; must be new or empty.
      dtype: a floating-point type to store; empty keeps those of the source.
      max_shard_bytes: above this size the weights go to several files.

    Raises:
      NeoError: the folder holds files, or cannot be written.
    """
    with new_folder(output) as folder:
        write_model(folder, source.config, _cast(source, dtype), source.tokenizer, max_shard_bytes)
        theirs = make_path(source.name) / "generation_config.json"
        if theirs.is_file():
            (folder / theirs.name).write_bytes(theirs.read_bytes())
    return folder


def convert_to_run(source: Source, output: str, config: TrainConfig) -> Path:
    """Writes the folder of a run that is to take its first step: `train` goes on from it.

    The state is held whole, in float32, on one device: with AdamW 12 bytes a parameter.

    Args:
      source: what `open_source` gave.
      output: the folder; must be new or empty.
      config: of the run; its mesh and its data are for `train` to find.

    Returns:
      The folder.

    Raises:
      NeoError: the config trains adapters or another model, or the folder holds files or cannot be
        written.
    """
    if config.lora.rank:
        raise NeoError(
            "a run that trains adapters keeps them alone; convert to a folder, and name it in the "
            "config's pretrained."
        )
    if config.epochs:
        raise NeoError("epochs are counted on data, which is not read here; give steps instead.")
    config = find_pretrained(config)[0]
    differences = [
        f"{field.name} {getattr(config.model, field.name)!r}, not {theirs!r}"
        for field in dataclasses.fields(ModelConfig)
        if getattr(config.model, field.name) != (theirs := getattr(source.config, field.name))
    ]
    if differences:
        raise NeoError(
            f"the config trains another model than {source.name} holds ({'; '.join(differences)}); "
            "change its field model."
        )
    with new_folder(output) as folder:
        arrays = {
            row.path: copy(
                source.leaves[row.path].read()[: row.shape[0]], np.dtype("f4"), row.shape
            )
            for row in tensors(config.model)
        }
        params = stack(unflatten_dict(arrays), config.model)
        del arrays
        optimizer = make_optimizer(config.optimizer, config.steps)
        start = jax.jit(functools.partial(state_of, optimizer=optimizer), donate_argnums=0)
        with Checkpoints(folder / "checkpoints", config.keep) as checkpoints:
            checkpoints.save(start(params), dataclasses.replace(config, output=output))
    return folder


def _cast(source: Source, dtype: str) -> Leaves:
    if not dtype:
        return source.leaves
    kind = float_dtype(dtype)
    return {path: Leaf(kind, leaf.read) for path, leaf in source.leaves.items()}


def verify(source: Source, folder: Path, dtype: str = "") -> Verified:
    """Reads back every tensor, one at a time, and where transformers is installed compares logits.

    Raises:
      NeoError: anything differs.
    """
    if read_config(folder) != source.config:
        raise NeoError(f"{folder}: config.json reads as another model; do not use this folder.")
    with stored_leaves(folder, source.config) as written:
        found = _compare(source, folder, dtype, written)
    return found._replace(logits=_logits(folder))


def verify_run(source: Source, folder: Path, config: TrainConfig) -> Verified:
    """Reads back what `convert_to_run` wrote, as `train` will, and compares every tensor.

    Raises:
      NeoError: anything differs.
    """
    config = find_pretrained(config)[0]
    optimizer = make_optimizer(config.optimizer, config.steps)
    with Checkpoints(folder / "checkpoints", config.keep) as checkpoints:
        state = checkpoints.restore_latest(abstract_state(Neo(config.model), optimizer), config)
    assert state is not None  # it was written
    arrays = flatten_dict(unstack(state.params, config.model))
    leaves = {
        path: Leaf(leaf.dtype, functools.partial(np.asarray, leaf)) for path, leaf in arrays.items()
    }
    found = _compare(source, folder, "float32", leaves)
    return found._replace(logits="not compared: transformers reads no runs")


def _compare(source: Source, folder: Path, dtype: str, written: Leaves) -> Verified:
    """Compares what was written with what the source holds."""
    largest, num_bytes = 0.0, 0
    for path, leaf in _cast(source, dtype).items():
        theirs, ours = leaf.read(), written[path].read()
        rows = min(len(theirs), len(ours))  # one of them may be padded, with zeros
        theirs, ours, padding = theirs[:rows], ours[:rows], ours[rows:]
        expected = theirs.astype(leaf.dtype)
        if ours.dtype != leaf.dtype or ours.tobytes() != expected.tobytes() or padding.any():
            raise NeoError(
                f"{folder}: {'/'.join(path)} is not what its source holds; do not use this "
                "folder, and look at the disk."
            )
        num_bytes += ours.nbytes
        if leaf.dtype != theirs.dtype:
            change = np.abs(ours.astype(np.float32) - theirs.astype(np.float32))
            largest = max(largest, float(np.nanmax(change, initial=0)))
    count = len({row.hf_name for row in tensors(source.config)})
    return Verified(count, source.config.num_params, num_bytes, largest, logits="")


def _logits(folder: Path) -> str:
    """Compares logits with those of transformers; returns how far they are apart, in words."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return "not compared: torch and transformers are not installed"
    if is_remote(folder):
        return "not compared: the folder is in the cloud"
    config = read_config(folder)
    needed, free = 24 * config.num_params, _free_memory()
    if needed > free:
        return f"not compared: it takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free"
    length = min(config.max_length, 2 * config.window_size + 9)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    # Where a classifier of texts looks for their ends.
    tokens[0, -1] = next(i for i in range(config.vocab_size) if i not in config.eos_ids)
    single, exact = _theirs(folder, config, tokens)
    params = load_params(folder, config, dtype="float32")
    apply = jax.jit(functools.partial(_ours, Neo(config)))
    ours = np.asarray(apply(params, jnp.asarray(tokens)), np.float64)
    error, noise = np.abs(ours - exact).max(), np.abs(single - exact).max()
    scale = exact.std()
    if not error <= 2 * noise + 2e-6 * scale:
        raise NeoError(
            f"{folder}: logits of {length} tokens differ from those of transformers by "
            f"{error / scale:.2g} of their deviation, its own noise is {noise / scale:.2g}; do "
            "not use this folder, and report the model."
        )
    return (
        f"{length} tokens: {error / scale:.2g} of their deviation from float64, transformers "
        f"itself {noise / scale:.2g}"
    )


def _ours(model: Neo, params: Params, tokens: Array) -> Array:
    """Returns the logits of a model's head."""
    if not model.config.head.is_classifier:
        return model.apply({"params": params}, tokens).logits
    is_of_texts = model.config.head.kind == "score"
    return (classify_sequences if is_of_texts else classify_tokens)(model, params, tokens)


def _theirs(folder: Path, config: ModelConfig, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits of transformers in float32 and in float64."""
    import torch
    import transformers
    from transformers.models.gpt_neo import modeling_gpt_neo

    class Float64:
        """torch, but float32 is float64: GPT-Neo's code casts queries and keys to float32."""

        float32 = torch.float64

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        model, info = getattr(transformers, config.to_hf()["architectures"][0]).from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise NeoError(f"{folder}: transformers misses or does not know {wrong[0]}; report this.")
    ids = torch.tensor(tokens)

    def logits() -> np.ndarray:
        found = model.eval()(ids)
        ends = ("start_logits", "end_logits")  # of an answer
        pair = [found[name] for name in ends if name in found]
        return (torch.stack(pair, -1) if pair else found.logits).double().numpy()

    with torch.no_grad():
        single = logits()
        model.double()
        with mock.patch.object(modeling_gpt_neo, "torch", Float64()):
            return single, logits()


def _free_memory() -> int:
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return sys.maxsize  # no Linux: try
