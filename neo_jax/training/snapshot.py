"""One checkpoint on disk: what it holds, and reading it back as it was, or the model alone.

Its items are `state` (the arrays; the step is one of them) and, as JSON, `config` (with the seed,
from which every random key comes, and with what distinguishes the model that adapters are for from
others), `versions` of the libraries, `evaluation`, the held-out loss where there is one, and
`checks`, the checksums of the others: a disk may return other bits than it was given. What reads
them raises exceptions of many kinds.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from neo_jax import __version__
from neo_jax.axes import Params
from neo_jax.checkpoints.checksums import checksums
from neo_jax.config import ModelConfig
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import absolute
from neo_jax.model.scan import unstack
from neo_jax.training.config import TrainConfig
from neo_jax.training.step import TrainState

T = TypeVar("T")

Base = dict[str, dict[str, int]]  # checksums of a frozen model, by the dtype that they are of

_LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")
_PAUSES = (0.5, 2.0, 5.0)  # seconds between attempts: a file system may be away for a while
# A run cannot go on with others of these fields.
_FIXED = {
    "model": "another model",
    "lora": "other adapters",
    "soft_prompt": "another soft prompt",
    "optimizer.name": "another optimizer",
}


def base_of(frozen: Params) -> Base:
    """Returns what distinguishes a frozen model from others.

    Checksums of its own dtype, and as bfloat16: the dtype of a run's products may change.
    """
    dtype = jax.tree.leaves(frozen)[0].dtype
    return {name: checksums(frozen, name) for name in {"bfloat16", dtype.name}}


def items(state: TrainState, config: TrainConfig, loss: float, base: Base) -> ocp.args.Composite:
    """Returns what a checkpoint is to hold, as orbax takes it; of the loss see `Checkpoints.save`.

    The base is what `base_of` returned where adapters are trained, else empty.
    """
    libraries = {name: version(name) for name in _LIBRARIES}
    texts = {
        "config": {**dataclasses.asdict(config), "base": base},
        "versions": {"neo_jax": __version__, "python": platform.python_version(), **libraries},
        "evaluation": {} if math.isnan(loss) else {"loss": loss},
    }
    checks = {name: _digest(fields) for name, fields in texts.items()}
    texts["checks"] = {"state": checksums(state), **checks}
    saved = {name: ocp.args.JsonSave(fields) for name, fields in texts.items()}
    return ocp.args.Composite(state=ocp.args.StandardSave(state), **saved)


def read(folder: Path, name: str) -> Any:
    """Returns a JSON item of the checkpoint in a folder."""
    fields, expected = _read(folder, name, _json), _checks(folder).get(name)
    if expected not in (None, _digest(fields)):
        raise ValueError(f"its {name} is not what was written")
    return fields


def read_state(folder: Path, abstract: TrainState) -> tuple[TrainState, dict[str, int]]:
    """Returns the state of the checkpoint in a folder, and the checksums that it is to have.

    Of `abstract` see `Checkpoints.restore_latest`.
    """
    handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, _Arrays()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    places = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(abstract, restore_args=places)
    # Not by orbax's manager: a process that fails would leave the others at its barrier.
    state = _read(folder, "state", functools.partial(handler.restore, args=args))
    return state, state_checks(folder)


class _Arrays(ocp.type_handlers.ArrayHandler):
    """Reads arrays; where one fails, orbax closes the loop in which others are still read."""

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> Sequence[jax.Array]:
        """Returns arrays; an error comes after the last of them has ended."""
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        except Exception:
            await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)
            raise


def state_checks(folder: Path) -> dict[str, int]:
    """Returns the checksums of the state in a folder as it was written."""
    return _checks(folder).get("state", {})


def difference(state: Any, expected: dict[str, int], prefix: str = "") -> str:
    """Says which array is not what was written, if one is; all processes must call this.

    Nothing is compared where no checksums are expected. The prefix says where in the state the
    arrays are, in the notation of `jax.tree_util.keystr`.
    """
    found = checksums(state) if expected else {}
    wrong = [path for path, number in found.items() if expected.get(prefix + path) != number]
    return f"{prefix}{wrong[0]} is not what was written" if wrong else ""


def attempt(read: Callable[[], T]) -> tuple[T | None, str]:
    """Returns what a function reads, or None and why it cannot, after some attempts."""
    why = ""
    for pause in (*_PAUSES, 0.0):
        try:
            return read(), ""
        except Exception as error:  # damage shows in many ways
            why = short(error)
        time.sleep(pause)
    return None, why


def short(error: BaseException) -> str:
    """Returns why in a few words: orbax and tensorstore add the specification of an array."""
    while error.__cause__:
        error = error.__cause__
    words = reason(error).split(" [")[0].rstrip(".")
    while len(words) > 150 and ": " in words:  # the innermost is the last
        words = words.split(": ", 1)[1]
    return words[:150]


def changes(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Returns which fields of a config are others than in a checkpoint, "8 -> 16" each by name."""
    ours = _flat(dataclasses.asdict(config))
    defaults = _flat(dataclasses.asdict(TrainConfig("", "", 1, 1)))
    # A field that an older version had not has its default in what it saved.
    theirs = {"data": None, "steps": None, "batch_size": None} | defaults | _flat(saved)
    return {
        name: f"{theirs[name]} -> {value}"
        for name, value in ours.items()
        if name != "output" and theirs[name] != value
    }


def other(saved: dict[str, Any], config: TrainConfig, base: Base) -> str:
    """Says what a checkpoint was saved by if this run cannot go on from it, else ""."""
    found = changes(saved, config)
    for field, what in _FIXED.items():
        changed = [f"{name} {found[name]}" for name in found if name.startswith(field)]
        if changed:
            return f"{what} ({', '.join(changed)})"
    theirs = saved.get("base", {})
    if any(theirs[dtype] != base[dtype] for dtype in base.keys() & theirs.keys()):
        return f"adapters of another model than the one in pretrained, {config.pretrained}"
    return ""


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
        config = read(folder, "config")
        fields = {field.name for field in dataclasses.fields(ModelConfig)}
        model = ModelConfig(**{k: v for k, v in config["model"].items() if k in fields})
        data: str = config["data"]
    if config.get("lora", {}).get("rank") or config.get("soft_prompt", {}).get("tokens"):
        raise NeoError(
            f"{folder} holds adapters and not the model; convert the folder 'model' that a run of "
            "LoRA leaves at its end."
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
        wrong = difference(params, state_checks(folder), prefix=".params")
        if wrong:
            raise ValueError(wrong)
    return unstack(params, config)


def _flat(fields: dict[str, Any]) -> dict[str, Any]:
    return flatten_dict(json.loads(json.dumps(fields)), sep=".")


def _read(folder: Path, name: str, how: Callable[[Path], T]) -> T:
    return how(folder / name)


def _json(folder: Path) -> Any:
    return json.loads((folder / "metadata").read_text(encoding="utf-8"))


def _checks(folder: Path) -> dict[str, Any]:
    """Returns the checksums of a checkpoint; older versions wrote none."""
    return _read(folder, "checks", _json) if (folder / "checks").is_dir() else {}


def _digest(fields: Any) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except NeoError:
        raise
    except Exception as error:  # damage shows in many ways
        raise NeoError(f"{folder} is damaged ({reason(error)[:150]}); choose another.") from None
