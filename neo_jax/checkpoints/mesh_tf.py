"""The model of a JSON config of EleutherAI/gpt-neo (Mesh-TensorFlow)."""

from typing import Any

from neo_jax.config import ModelConfig, expand_types
from neo_jax.errors import NeoError, brief


def model_config(fields: dict[str, Any], source: str) -> ModelConfig:
    """Returns the shape that a config describes; `source` names it in errors.

    Raises:
      NeoError: a field is missing or wrong, or it is another model.
    """
    notes: list[str] = []
    try:
        found = ModelConfig(**model_fields(fields, notes))
    except KeyError as error:
        raise NeoError(f"{source}: key {error} is missing; is the file whole?") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise NeoError(f"{source}: {error}") from error
    if any("ANOTHER MODEL" in note for note in notes):
        raise NeoError(f"{source}: layers of type 'none' are not of GPT-Neo; there is no way in.")
    return found


def model_fields(fields: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Returns the fields of a `ModelConfig`; what has no counterpart is reported in `notes`.

    Raises:
      NeoError: it is another model.
    """
    pairs = fields.get("attention_types") or [[["global"], fields["n_layer"]]]
    types = expand_types(pairs, fields["n_layer"])
    if "none" in types:
        notes.append(
            "attention_types name layers of type 'none', without attention, which no GPT-Neo has: "
            "they are 'local' here, ANOTHER MODEL"
        )
        types = tuple("local" if kind == "none" else kind for kind in types)
    unit = next(n for n in range(1, len(types) + 1) if types == types[:n] * (len(types) // n))
    # That code reads activation_fn alone, though its configs say activation_function.
    activation = fields.get("activation_fn") or fields.get("activation_function", "gelu")
    if activation not in ("gelu", "relu"):
        raise NeoError(f"activation {brief(activation)} has no counterpart; choose gelu or relu.")
    if not fields.get("scale_by_depth"):
        notes.append("scale_by_depth is off: here c_proj is drawn by depth all the same")
    if fields.get("scale_by_in"):
        notes.append("scale_by_in True is left out: weights are not drawn by inputs here")
    return {
        "num_layers": fields["n_layer"],
        "embed_dim": fields["n_embd"],
        "num_heads": fields["n_head"],
        "vocab_size": fields["n_vocab"],
        "max_length": fields["n_ctx"] if "n_ctx" in fields else fields["n_positions"],
        "window_size": fields.get("local_attention_radius", 256),
        "attention_types": types[:unit],
        "activation": "gelu_new" if activation == "gelu" else activation,
        "eos_token_id": fields.get("eos_id", 50256 if fields["n_vocab"] > 50256 else -1),
    }
