"""Eight CPU devices stand in for a mesh; shapes are checked wherever a signature names them."""

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Must precede the first import of the modules that it checks.
_MODULES = [
    "neo_jax.attention", "neo_jax.cache", "neo_jax.decode.engine", "neo_jax.layers",
    "neo_jax.model", "neo_jax.training.loss",
]  # fmt: skip
jaxtyping.install_import_hook(_MODULES, "beartype.beartype")

from neo_jax.config import ModelConfig  # noqa: E402
from neo_jax.model import Neo, init_params  # noqa: E402


@pytest.fixture(autouse=True)
def _no_user_cache(monkeypatch, tmp_path_factory):
    """Keeps compiled programs of tests out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def tiny_config():
    """Four layers, a window of 8: small enough to compile in a second."""
    return ModelConfig(
        num_layers=4,
        embed_dim=32,
        num_heads=2,
        vocab_size=96,
        max_length=64,
        window_size=8,
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def tiny(tiny_config):
    """A model of `tiny_config` and its parameters."""
    model = Neo(tiny_config)
    return model, jax.jit(lambda key: init_params(model, key))(jax.random.key(0))


@pytest.fixture
def rng():
    """A numpy generator of a fixed seed."""
    return np.random.default_rng(0)
