"""The model in a training checkpoint, without the optimizer: for use elsewhere."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from neo_jax.axes import Params
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import absolute
from neo_jax.model.scan import unstack
from neo_jax.training import snapshot


def find_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint in the folder of a run, of its checkpoints, or of one; the newest."""
    if (folder / "state").is_dir() and (folder / "config").is_dir():
        return folder
    for place in (folder / "checkpoints", folder):
        steps = [path for path in place.glob("*") if path.name.isdecimal()]
        whole = [path for path in steps if (path / "state").is_dir()]
        if whole:
            return max(whole, key=lambda path: int(path.name))
    return None


def read_model(folder: Path) -> tuple[ModelConfig, str]:
    """Returns the model of a checkpoint that `find_checkpoint` found, and the data set's name.

    Raises:
      NeoError: it is damaged, or holds adapters alone.
    """
    folder = absolute(folder)
    with _explained(folder):
        config = snapshot.read(folder, "config")
        fields = {field.name for field in dataclasses.fields(ModelConfig)}
        model = ModelConfig(**{k: v for k, v in config["model"].items() if k in fields})
        data: str = config["data"]
    if config.get("lora", {}).get("rank"):
        raise NeoError(
            f"{folder} holds adapters and not the model; convert the folder 'model' that the run "
            "leaves at its end."
        )
    return model, data


def read_params(folder: Path, config: ModelConfig) -> Params:
    """Reads the canonical parameters of a checkpoint, as numpy arrays, and nothing else.

    Raises:
      NeoError: it is damaged.
    """
    folder, handler = absolute(folder), ocp.PyTreeCheckpointHandler()
    with _explained(folder):
        metadata = handler.metadata(folder / "state")
        saved = {"params": getattr(metadata, "tree", metadata)["params"]}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved)
        places = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved)
        args = ocp.args.PyTreeRestore(abstract, restore_args=places, partial_restore=True)
        params = handler.restore(folder / "state", args=args)["params"]
        wrong = snapshot.difference(params, snapshot.state_checks(folder), prefix=".params")
        if wrong:
            raise ValueError(wrong)
    return unstack(params, config)


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except NeoError:
        raise
    except Exception as error:  # damage shows in many ways
        raise NeoError(f"{folder} is damaged ({reason(error)[:150]}); choose another.") from None
