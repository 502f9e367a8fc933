"""Weights on disk, opened for reading tensor by tensor: a module a format, one way to read.

| module           | files of a folder                                      | names, layouts of  |
|------------------|--------------------------------------------------------|--------------------|
| safetensors_file | model.safetensors, or shards and their index           | Hugging Face       |
| torch_file       | pytorch_model.bin, likewise                            | Hugging Face       |
| flax_file        | flax_model.msgpack, likewise                           | Hugging Face, Flax |
| mesh_tf_files    | NAME.index and its data, which `checkpoint` may name   | Mesh-TensorFlow    |
"""

import contextlib
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from neo_jax.checkpoints.formats.safetensors_file import CODES, open_file
from neo_jax.checkpoints.formats.stored import FLOATS, StoredTensor
from neo_jax.errors import NeoError
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file
from neo_jax.model.tensor_table import Format

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The first that is there counts. What opens a file is imported when there is one.
_KINDS: tuple[tuple[str, Format, str], ...] = (
    (SINGLE, "hf", "safetensors_file"),
    ("pytorch_model.bin", "hf", "torch_file"),
    ("flax_model.msgpack", "flax", "flax_file"),
)


# Words that wrappers put into names: DataParallel and DDP, torch.compile, Lightning, trl, FSDP.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|model|pretrained_model|_fsdp_wrapped_module)\."
)


class Weights(NamedTuple):
    """All tensors of a checkpoint."""

    source: Path  # the file that says what there is
    form: Format  # whose names and layouts these are
    tensors: dict[str, StoredTensor]


def open_weights(folder: Path, files: contextlib.ExitStack) -> Weights:
    """Opens what a folder holds; `files` closes it. Names are without the words of wrappers.

    Raises:
      NeoError: files are missing, damaged, or contradict each other.
    """
    found = _find(folder)
    if found is not None:
        source, form, module = found
        open_one = importlib.import_module(f"neo_jax.checkpoints.formats.{module}").open_file
        tensors = (
            _open_shards(source, open_one, files)
            if source.suffix == ".json"
            else open_one(source, files)
        )
        return Weights(source, form, _unwrapped(source, tensors) if form == "hf" else tensors)
    if next(folder.glob("*.index"), None):
        from neo_jax.checkpoints.formats import mesh_tf_files

        return Weights(*mesh_tf_files.open_folder(folder))
    raise NeoError(
        f"{folder} holds no {', no '.join(single for single, *_ in _KINDS)} and no checkpoint of "
        "TensorFlow; name the folder of a model."
    )


def _unwrapped(source: Path, tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    plain: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        first = plain.setdefault(_WRAPPERS.sub("", name), stored)
        if first is not stored:
            raise NeoError(
                f"{source} holds both {first.name} and {name}, which are one parameter; remove one "
                "of them."
            )
    return plain


def holds_form(folder: Path, form: Format) -> bool:
    """Whether what `open_weights` would open has these names and layouts.

    Raises:
      NeoError: what has the name of a file is none.
    """
    found = _find(folder)
    return found is not None and found[1] == form


def _find(folder: Path) -> tuple[Path, Format, str] | None:
    """Returns the file that says what there is, whose names these are, and what opens it."""
    for single, form, module in _KINDS:
        for source in (folder / single, folder / f"{single}.index.json"):
            if is_file(source):
                return source, form, module
    return None


Opener = Callable[[Path, contextlib.ExitStack], dict[str, StoredTensor]]


def _open_shards(
    index: Path, open_shard: Opener, files: contextlib.ExitStack
) -> dict[str, StoredTensor]:
    folder = index.parent
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise NeoError(f"{index} has no weight_map of file names; download or copy it again.")
    shards: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if not is_file(folder / shard):
            raise NeoError(f"{index} names {shard}, which is not there; download or copy it again.")
        shards[shard] = open_shard(folder / shard, files)
    found = {name: stored for shard in shards.values() for name, stored in shard.items()}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise NeoError(
                f"{index} says that {shard} holds {name}, which it does not; download or copy "
                "both again."
            )
        found[name] = shards[shard][name]
    return found


__all__ = [
    "CODES", "FLOATS", "INDEX", "SINGLE", "StoredTensor", "Weights", "holds_form", "open_file",
    "open_weights",
]  # fmt: skip
