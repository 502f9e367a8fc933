"""Compiled programs are kept from run to run: the one setting of JAX that `load` changes."""

import os

import jax

from neo_jax.files.paths import cache_folder


def enable_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, if it can be written.

    Where JAX is configured with another folder, or to keep none, that counts.
    """
    chosen = jax.config.values
    if not chosen["jax_compilation_cache_dir"] and chosen["jax_enable_compilation_cache"]:
        folder = cache_folder() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return
        if os.access(folder, os.W_OK):  # where not, JAX would warn of every program
            jax.config.update("jax_compilation_cache_dir", str(folder))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
