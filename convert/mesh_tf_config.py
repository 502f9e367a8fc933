"""A JSON config of EleutherAI/gpt-neo (Mesh TensorFlow) as a Python config of this package.

What a key means is read from that repository's code: `model_fns.py`, `optimizers.py`,
`models/gpt2/gpt2.py` and Mesh TensorFlow's `serialize_num_microbatches`. No key is dropped in
silence: what has no counterpart is named in a note, what would be another model is an error.
"""

import dataclasses
import os
from textwrap import wrap
from typing import Any

from neo_jax.checkpoints.mesh_tf import model_fields
from neo_jax.errors import NeoError, suggest
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import make_path

_OTHER_MODELS = frozenset(
    """axial_pos_emb entmax_loss macaron mlm_training mlp_glu moe_layers no_weight_tie num_mem_kv
    rezero rotary_emb scalenorm share_parameters""".split()
)
_AXES = {
    "batch": "batch", "heads": "heads", "vocab": "vocab", "embd": "embed", "sequence": "length",
    "intermediate_expanded": "mlp", "embed_sequence": "positions",
}  # fmt: skip
_NEEDED = ("n_layer", "n_embd", "n_head", "n_vocab", "n_ctx", "lr", "train_batch_size",
           "train_steps")  # fmt: skip
_READ = frozenset(
    """activation_fn activation_function attention_types beta1 beta2 datasets embed_dropout
    epsilon eos_id eval_steps gradient_clipping layout local_attention_radius lr_decay mesh_shape
    opt_name precision recompute_grad res_dropout scale_by_depth scale_by_in seed
    tokens_per_mb_per_replica warmup_steps weight_decay z_loss""".split()
)
_NO_COUNTERPART = {
    "ada_epsilon1": "Adafactor here has optax's",
    "ada_epsilon2": "Adafactor here has no scale of parameters",
    "attn_dropout": "attention has no dropout here",
    "eval_batch_size": "evaluation has batch_size too",
    "eval_tasks": "",
    "input_fn": "batches are drawn as README.md says",
    "iterations": "",
    "log_grads": "",
    "lr_decay_end": "the rate falls until the last step here",
    "mlm_mask_id": "",
    "model": "",
    "model_path": "this run has a folder of its own, output",
    "moe_params": "",
    "padding_id": "",
    "predict_batch_size": "",
    "predict_max_steps": "",
    "predict_steps": "",
    "remove_partial_sequences": "",
    "shuffle_input_filenames": "",
}
_COMMENT = {"initial_indent": "# ", "subsequent_indent": "#   "}
_KNOWN = {*_NEEDED, *_READ, *_OTHER_MODELS, *_NO_COUNTERPART}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A config file, and what it says in comments of the keys that have no counterpart."""

    text: str
    notes: tuple[str, ...]


def convert(source: str | os.PathLike[str]) -> Converted:
    """Converts a JSON config.

    Raises:
      NeoError: the file cannot be read, a key is unknown or missing, or it describes a model that
        is no GPT-Neo.
    """
    path = make_path(source)
    fields = read_json(path)
    for key, value in fields.items():
        if key not in _KNOWN:
            raise NeoError(f"{path}: unknown key '{key}'.{suggest(key, _KNOWN)}")
        if key in _OTHER_MODELS and value:
            raise NeoError(f"{path}: '{key}' is not of GPT-Neo and has no counterpart; remove it.")
    for key in _NEEDED:
        if key not in fields:
            raise NeoError(f"{path}: key '{key}' is missing; is the file whole?")
    notes = [
        f"{key} {fields[key]!r} is left out" + (f": {why}" if why else "")
        for key, why in _NO_COUNTERPART.items()
        if fields.get(key) not in (None, 0, [], {})
    ]
    try:
        model, optimizer = model_fields(fields, notes), _optimizer(fields, notes)
        run = _run(fields, path.stem, notes)
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        if isinstance(error, NeoError):
            raise NeoError(f"{path}: {error}") from error
        raise NeoError(f"{path}: a value has an unexpected form ({error}); correct it.") from error
    return Converted(_write(path.name, model, optimizer, run, notes), tuple(notes))


def _optimizer(fields: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    adam = fields.get("opt_name", "adam").lower() == "adam"
    chosen = {
        "name": "adamw" if adam else "adafactor",
        "learning_rate": fields["lr"],
        "schedule": fields.get("lr_decay") or "constant",
        "warmup_steps": fields.get("warmup_steps", 0),
        "final_fraction": 0.1,
        "weight_decay": float(fields.get("weight_decay") or 0),
        "clip_norm": float(fields.get("gradient_clipping") or 0),
    }
    if chosen["schedule"] not in ("cosine", "linear", "constant"):
        raise NeoError(f"lr_decay '{chosen['schedule']}' is unknown; choose cosine or linear.")
    of_adam = {key: fields[key] for key in ("beta1", "beta2", "epsilon") if key in fields}
    if adam:
        return chosen | of_adam
    notes.extend(f"{key} is left out: it is Adam's here" for key in of_adam)
    notes.append("weight_decay was the decay_rate of that Adafactor; here it is a weight decay")
    return chosen


def _run(fields: dict[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    batch_size = fields["train_batch_size"]
    mesh, rules, shards = _mesh(fields, notes)
    dropout = float(fields.get("res_dropout") or 0)
    if float(fields.get("embed_dropout") or 0) != dropout:
        notes.append(f"embed_dropout {fields.get('embed_dropout')} is left out: dropout is for all")
    if fields.get("eval_steps"):
        notes.append(f"eval_steps {fields['eval_steps']}: here the whole held-out split is read")
    return {
        "data": _data(fields, notes),
        "output": f"runs/{name}",
        "steps": fields["train_steps"],
        "batch_size": batch_size,
        "seed": fields.get("seed") or 0,
        "dtype": "bfloat16" if fields.get("precision") == "bfloat16" else "float32",
        "remat": "full" if fields.get("recompute_grad") else "none",
        "accumulation": _accumulation(fields, batch_size // shards),
        "dropout": dropout,
        "z_loss": float(fields.get("z_loss", 1e-4)),
        "mesh": mesh,
        "rules": rules,
    }


def _data(fields: dict[str, Any], notes: list[str]) -> str:
    """Returns the data sets as folders in data/, with their shares where there are several."""
    entries = [[entry] if isinstance(entry, str) else entry for entry in fields.get("datasets", ())]
    if not entries:
        return "data"
    notes.append(
        f"datasets {fields['datasets']!r}: prepare each with neo-jax prepare; how documents were "
        "stitched and sampled is left out"
    )
    if len(entries) == 1:
        return f"data/{entries[0][0]}"
    shares = (f"data/{entry[0]}={entry[3] if len(entry) > 3 else 1.0}" for entry in entries)
    return ",".join(shares)


def _accumulation(fields: dict[str, Any], rows: int) -> int:
    """Returns the number of microbatches, of which a replica has `rows` sequences in all."""
    tokens = fields.get("tokens_per_mb_per_replica")
    size = max(1, tokens // fields["n_ctx"]) if tokens else rows
    while rows % size:  # as Mesh TensorFlow does
        size -= 1
    return rows // size


def _mesh(fields: dict[str, Any], notes: list[str]) -> tuple[str, str, int]:
    """Returns mesh, rules, and into how many parts they split the batch."""
    shape = _pairs(fields.get("mesh_shape") or "")
    layout = _pairs(fields.get("layout") or "")
    names: dict[str, str] = {}
    rules = []
    for theirs, axis in sorted(layout.items(), key=lambda item: item[0] != "batch"):
        if theirs not in _AXES or axis not in shape:
            notes.append(f"layout {theirs}:{axis} is left out: no rule here splits it")
            continue
        free = [n for n in ("data", "model", "fsdp", "context") if n not in names.values()]
        if axis not in names:
            names[axis] = free[0] if theirs == "batch" else next(n for n in free if n != "data")
        rules.append(f"{_AXES[theirs]}:{names[axis]}")
    for axis, size in shape.items():
        if axis not in names:
            notes.append(f"mesh_shape {axis}:{size} is left out: no rule uses it")
    mesh = ",".join(f"{names[axis]}={size}" for axis, size in shape.items() if axis in names)
    if mesh and "batch" not in layout:
        rules.append("batch:")
    return mesh, ",".join(rules), int(shape.get(layout.get("batch", ""), 1))


def _pairs(text: str) -> dict[str, str]:
    entries = (entry.partition(":") for entry in text.replace(";", ",").split(",") if entry.strip())
    return {name.strip(): value.strip() for name, _, value in entries}


def _write(
    name: str,
    model: dict[str, Any],
    optimizer: dict[str, Any],
    run: dict[str, Any],
    notes: list[str],
) -> str:
    lines = [f'"""Converted from {name} of EleutherAI/gpt-neo by neo-jax convert."""', ""]
    lines += [
        "from neo_jax.config import ModelConfig",
        "from neo_jax.training.config import OptimizerConfig, TrainConfig",
        "",
        *(line for note in notes for line in wrap(note, 100, **_COMMENT)),
        "config = TrainConfig(",
    ]
    for key, value in run.items():
        lines.append(f"    {key}={_literal(value)},")
        if key == "batch_size":
            for field, kind, values in (
                ("model", "ModelConfig", model),
                ("optimizer", "OptimizerConfig", optimizer),
            ):
                inner = [f"        {k}={_literal(v)}," for k, v in values.items()]
                lines += [f"    {field}={kind}(", *inner, "    ),"]
    return "\n".join([*lines, ")", ""])


def _literal(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_literal, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
