"""devices/compilation_cache.py: where compiled programs are kept."""

import jax
import pytest

from neo_jax.devices.compilation_cache import enable_compilation_cache


@pytest.fixture
def cache_settings():
    """Puts JAX's settings back."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def cache_folder():
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.mark.usefixtures("cache_settings")
def test_compiled_programs_are_kept_unless_jax_was_told_otherwise(monkeypatch, tmp_path):
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    assert cache_folder() == str(tmp_path / "neo_jax" / "xla")

    jax.config.update("jax_compilation_cache_dir", "/somewhere")
    enable_compilation_cache()
    assert cache_folder() == "/somewhere"

    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    enable_compilation_cache()
    assert cache_folder() is None

    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    enable_compilation_cache()
    assert cache_folder() == str(tmp_path / "home" / ".cache" / "neo_jax" / "xla")
