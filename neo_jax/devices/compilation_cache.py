"""Compiled programs are kept from run to run: the one setting of JAX that `load` changes."""

import os
from pathlib import Path

import jax

from neo_jax.files.paths import cache_folder, is_remote


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, if it can be written.

    Where JAX is configured with another folder, or to keep none, that counts.
    """
    chosen = jax.config.values
    if not chosen["jax_compilation_cache_dir"] and chosen["jax_enable_compilation_cache"]:
        folder = _writable(_usual_folder())
        if folder:  # where not, JAX would warn of every program
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def kept_plans() -> Path | None:
    """Returns the folder for what plans tell of programs: next to the programs that JAX keeps.

    None where JAX is configured to keep nothing, or in the cloud, or it cannot be written.
    """
    chosen = jax.config.values
    programs = chosen["jax_compilation_cache_dir"] or _usual_folder()
    if not chosen["jax_enable_compilation_cache"] or is_remote(programs):
        return None
    return _writable(Path(programs) / "plans")


def _usual_folder() -> Path:
    return cache_folder() / "xla"


def _writable(folder: Path) -> Path | None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None
