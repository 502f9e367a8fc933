"""Checkpoints of TensorFlow, through its own reader: those of EleutherAI/gpt-neo."""

import functools
import re
from pathlib import Path

import numpy as np

from neo_jax.checkpoints.formats.stored import StoredTensor
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import is_remote
from neo_jax.model.tensor_table import Format


def open_folder(folder: Path) -> tuple[Path, Format, dict[str, StoredTensor]]:
    """Opens the checkpoint that the file `checkpoint` names, or else the one of the latest step.

    Raises:
      NeoError: TensorFlow is not installed, or the checkpoint is damaged or in the cloud.
    """
    if is_remote(folder):
        raise NeoError(f"{folder}: a checkpoint of TensorFlow must be on disk; copy it there.")
    try:
        import tensorflow
    except ImportError:
        raise NeoError(
            f"{folder} holds a checkpoint of TensorFlow, which needs its reader; install it: "
            "pip install 'neo_jax[tensorflow]'"
        ) from None
    prefix = _prefix(folder)
    try:
        reader = tensorflow.train.load_checkpoint(str(prefix))
        shapes = reader.get_variable_to_shape_map()
        dtypes = reader.get_variable_to_dtype_map()
    except Exception as error:  # of TensorFlow, one class a kind of damage
        raise NeoError(
            f"{prefix}.index is damaged ({reason(error)}); download or copy it again."
        ) from None

    def read(name: str) -> np.ndarray:
        try:
            return reader.get_tensor(name)
        except Exception as error:
            raise NeoError(
                f"{prefix}: cannot read {name} ({reason(error)}); download or copy it again."
            ) from None

    index = folder / f"{prefix.name}.index"
    return (
        index,
        "mesh_tf",
        {
            name: StoredTensor(
                index, name, dtypes[name].name, tuple(shape), functools.partial(read, name)
            )
            for name, shape in shapes.items()
        },
    )


def _prefix(folder: Path) -> Path:
    """Returns the path of a checkpoint without what ends the names of its files."""
    state = folder / "checkpoint"
    if state.is_file():
        named = re.search(r'^model_checkpoint_path: "(.+)"', state.read_text(errors="replace"))
        if named and (folder / f"{Path(named[1]).name}.index").is_file():
            return folder / Path(named[1]).name
    found = [path.with_suffix("") for path in folder.glob("*.index")]
    return max(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)])
