"""What a checkpoint holds, before it is read: its model, and each parameter's tensor in the files.

A checkpoint is a folder with config.json and weights, in any format of
`neo_jax.checkpoints.formats`.
"""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from neo_jax.axes import VOCAB
from neo_jax.checkpoints import mesh_tf
from neo_jax.checkpoints.formats import FLOATS, StoredTensor, Weights, holds_form, open_weights
from neo_jax.checkpoints.host_device import check_finite
from neo_jax.checkpoints.save import MARK, METHOD, Leaf
from neo_jax.config import QUANTIZED, ModelConfig
from neo_jax.errors import NeoError, warn
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import is_file, make_path
from neo_jax.labels import CLASSIFIERS
from neo_jax.model.tensor_table import Format, Tensor, tensors

# Buffers that old versions of transformers saved with every attention layer.
_STALE = re.compile(r"(^|\.)h\.\d+\.attn\.(attention\.)?(bias|masked_bias)$")

# Heads next to the model's own, or in its place, which transformers and trl save.
_OTHER_HEADS = ("v_head", "multiple_choice_head", *CLASSIFIERS)

_HEAD = "lm_head.weight"
_TABLE = "transformer.wte.weight"


def open_model(folder: str | os.PathLike[str]) -> tuple[ModelConfig, bool]:
    """Reads the config.json of a checkpoint; returns also whether its weights are int8.

    An output head that the weights hold counts, as in transformers, where config.json says that it
    is the table of tokens and the two differ.

    Raises:
      NeoError: it is missing, damaged, or describes another architecture; or the weights are
        damaged.
    """
    path = make_path(folder) / "config.json"
    if not is_file(path):
        fix = "name the folder of a checkpoint"
        if (make_path(folder) / "checkpoints").is_dir():
            fix = f"of a run that has not ended, neo-jax convert {folder} NEW makes a model"
        raise NeoError(f"{folder} holds no config.json; {fix}.")
    fields = read_json(path)
    if "n_vocab" in fields and "model_type" not in fields:
        return mesh_tf.model_config(fields, source=str(path)), False
    if is_int8 := fields.get(MARK) == METHOD:
        del fields[MARK]
    config = ModelConfig.from_hf(fields, source=str(path))
    is_tied = config.tied_head and not config.head.is_classifier
    if not is_int8 and is_tied and _has_own_head(path.parent):
        config = dataclasses.replace(config, tied_head=False)
    return config, is_int8


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config.json of a checkpoint of floats.

    Raises:
      NeoError: as `open_model`; or the weights are int8.
    """
    config, is_int8 = open_model(folder)
    if is_int8:
        raise NeoError(f"{make_path(folder) / 'config.json'}: {QUANTIZED}")
    return config


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
        rows = match(config, open_weights(make_path(folder), files))
    return sorted({stored.dtype for _, stored in rows})


@contextlib.contextmanager
def stored_leaves(
    folder: str | os.PathLike[str], config: ModelConfig
) -> Iterator[dict[tuple[str, ...], Leaf]]:
    """Gives a checkpoint's parameters by their paths, to be read one at a time while it is open.

    Raises:
      NeoError: as `neo_jax.checkpoints.load.load_params`.
    """
    with contextlib.ExitStack() as files:
        weights = open_weights(make_path(folder), files)

        def read(tensor: Tensor, stored: StoredTensor) -> np.ndarray:
            view = tensor.of(weights.form, stored.view())
            return check_finite(view, f"{stored.path}: {stored.name}")

        yield {
            tensor.path: Leaf(np.dtype(stored.dtype), functools.partial(read, tensor, stored))
            for tensor, stored in match(config, weights)
        }


def match(config: ModelConfig, weights: Weights) -> list[tuple[Tensor, StoredTensor]]:
    """Pairs every parameter with what is stored for it, and accounts for all that is stored.

    Raises:
      NeoError: other tensors are stored than `config` describes.
    """
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
    known, heads = set(wanted), {}
    for name in stored.keys() - known:
        if (module := name.removeprefix("transformer.").partition(".")[0]) in _OTHER_HEADS:
            heads[name] = module
    unexpected = [x.name for name, x in stored.items() if name not in known | heads.keys()]
    _report_heads(source, heads)
    if unexpected:
        raise NeoError(
            f"{source} holds {len(unexpected)} tensors that a model of this config.json has not, "
            f"the first {unexpected[0]}; is config.json of the same model?"
        )
    rows = [(tensor, stored[tensor.places[form].name]) for tensor in table]
    for tensor, entry in rows:
        _check(entry, tensor, form)
    return rows


def _report_heads(source: Path, heads: dict[str, str]) -> None:
    """Warns of heads that are left out, such as of a classifier that is to learn other labels."""
    if heads:
        names = ", ".join(sorted({f"{module}.*" for module in heads.values()}))
        warn(f"{source}: {names} left out: {len(heads)} tensors of a head next to the model.")


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
        is_full = name in names or name.startswith(head)
        full = name if is_full else f"{prefix}{name.removeprefix(prefix)}"
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
