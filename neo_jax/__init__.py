"""GPT-Neo for meshes: load, train, evaluate and generate with JAX.

import neo_jax
lm = neo_jax.load("EleutherAI/gpt-neo-1.3B")
lm.generate("EleutherAI has", max_new_tokens=50)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neo_jax.config import ModelConfig
    from neo_jax.errors import NeoError
    from neo_jax.model.transformer import Neo
    from neo_jax.sharding.rules import Sharding, make_sharding
    from neo_jax.text.language_model import LanguageModel
    from neo_jax.text.load import load

__version__ = "0.1.0"

__all__ = [
    "LanguageModel", "ModelConfig", "Neo", "NeoError", "Sharding", "__version__", "load",
    "make_sharding",
]  # fmt: skip

_HOMES = {
    "LanguageModel": "text.language_model",
    "ModelConfig": "config",
    "Neo": "model.transformer",
    "NeoError": "errors",
    "Sharding": "sharding.rules",
    "load": "text.load",
    "make_sharding": "sharding.rules",
}


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    # Imported at first use: a command that needs no JAX does not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'neo_jax' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"neo_jax.{_HOMES[name]}"), name)
