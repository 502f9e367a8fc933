"""training/metrics.py: FLOPs and memory."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from neo_jax.config import ModelConfig, preset
from neo_jax.model.tensor_table import tensors
from neo_jax.training import metrics
from neo_jax.training.metrics import flops_per_token, peak_flops, peak_memory

TINY = ModelConfig(
    num_layers=4, embed_dim=32, num_heads=2, vocab_size=96, max_length=64, window_size=8
)


def counted(config, length):
    """Multiplications and additions of a forward pass, counted one by one, three times over.

    The backward pass multiplies twice where the forward pass does once.
    """
    weights = sum(math.prod(row.stored_shape) for row in tensors(config) if row.path[0] != "wpe")
    seen = 0
    for kind in config.layer_types:
        window = config.window_size if kind == "local" else length
        seen += sum(query - key < window for query in range(length) for key in range(query + 1))
    heads = config.num_heads * config.head_dim
    per_pair = 2 * heads + 2 * heads  # a logit, and a value's share of the output
    return 3 * (2 * weights * length + per_pair * seen) / length


@pytest.mark.parametrize("length", [1, 7, 8, 9, 40, 64])
@pytest.mark.parametrize(
    "attention_types", [("global", "local"), ("global",), ("local",), ("global", "local", "local",
                                                                       "local")]
)  # fmt: skip
def test_flops_are_what_a_count_gives(length, attention_types):
    config = dataclasses.replace(TINY, attention_types=attention_types)
    assert flops_per_token(config, length) == pytest.approx(counted(config, length), rel=1e-12)
    weights = sum(math.prod(row.stored_shape) for row in tensors(config) if row.path[0] != "wpe")
    saved = flops_per_token(config, length) - flops_per_token(config, length, frozen=True)
    assert saved == pytest.approx(2 * weights)  # those of the gradients


def test_flops_of_the_smallest_published_model():
    """Six a parameter and a half more for attention at the full context, by hand."""
    config = preset("gpt-neo-125m")
    keys = 6 * 2049 / 2 + 6 * (256 * 257 / 2 + 1792 * 256) / 2048
    expected = 6 * (125_198_592 - 2048 * 768) + 12 * 768 * keys
    assert flops_per_token(config, 2048) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [("TPU v4", 8, 8 * 275e12), ("NVIDIA H200", 1, 989e12), ("Abacus", 1, math.nan)],
)
def test_the_peak_of_known_devices(monkeypatch, kind, devices, expected):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    fake = SimpleNamespace(devices=lambda: [device])
    monkeypatch.setattr(metrics, "jax", fake)
    np.testing.assert_equal(peak_flops("bfloat16", devices), expected)


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops("float32", 8) < 1e15


def test_the_memory_of_a_cpu_is_that_of_the_process():
    assert 1e8 < peak_memory() < 1e12


def test_the_memory_of_devices_is_that_of_the_fullest(monkeypatch):
    stats = [{"peak_bytes_in_use": 3}, {"peak_bytes_in_use": 5}]
    devices = [SimpleNamespace(memory_stats=lambda each=each: each) for each in stats]
    fake = SimpleNamespace(default_backend=lambda: "tpu", local_devices=lambda: devices)
    monkeypatch.setattr(metrics, "jax", fake)
    assert peak_memory() == 5
    monkeypatch.setattr(devices[0], "memory_stats", lambda: None)
    assert math.isnan(peak_memory())
