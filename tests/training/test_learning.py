"""Whole runs against PyTorch: the loss of every step, as benchmarks/learning_parity.py."""

import numpy as np
import pytest

from benchmarks.learning_parity import TOLERANCE, draw_params, ours, theirs
from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.training.objectives.next_token import Batch

pytestmark = pytest.mark.optimized

STEPS, ROWS, LENGTH, VOCABULARY = 30, 8, 32, 150


@pytest.fixture
def batches(rng):
    """Of ids that mostly follow from the one before; some predictions do not count."""

    def batch():
        ids = np.zeros((ROWS, LENGTH + 1), np.int32)
        ids[:, 0] = rng.integers(0, VOCABULARY, ROWS)
        for i in range(LENGTH):
            ids[:, i + 1] = ids[:, i] // 3 + rng.integers(0, 20, ROWS)
        return Batch(ids, (rng.random((ROWS, LENGTH)) < 0.8).astype(np.float32))

    return [batch() for _ in range(STEPS)]


def test_every_loss_of_a_run_is_that_of_torch(batches):
    """Warm-up, cosine, clipping, decay of some weights, local attention, parts of a batch."""
    config = TrainConfig(
        data="",
        output="",
        steps=STEPS,
        batch_size=ROWS,
        accumulation=2,
        model=ModelConfig(
            num_layers=2,
            embed_dim=32,
            num_heads=2,
            vocab_size=VOCABULARY,
            max_length=LENGTH,
            window_size=4,
            eos_token_id=0,
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-2, warmup_steps=5, weight_decay=1.0, clip_norm=0.7
        ),
        dtype="float32",
        z_loss=0.0,
    )
    params = draw_params(config)
    losses, norms = ours(config, params, batches)
    assert 0 < np.mean(norms > config.optimizer.clip_norm) < 1  # some are clipped, not all
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, theirs(config, params, batches), rtol=TOLERANCE)
