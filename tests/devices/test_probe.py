"""devices/probe.py: what devices can do."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from neo_jax.devices import probe
from neo_jax.devices.probe import peak_flops


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [("TPU v4", 8, 8 * 275e12), ("NVIDIA H200", 1, 989e12), ("Abacus", 1, math.nan)],
)
def test_the_peak_of_known_devices(monkeypatch, kind, devices, expected):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    fake = SimpleNamespace(devices=lambda: [device])
    monkeypatch.setattr(probe, "jax", fake)
    np.testing.assert_equal(peak_flops("bfloat16", devices), expected)


@pytest.mark.parametrize(
    ("platform", "capabilities", "dtype"),
    [
        ("cpu", [None, None], "float32"),
        ("tpu", [None], "bfloat16"),
        ("gpu", ["9.0"], "bfloat16"),
        ("gpu", ["8.0", "8.6"], "bfloat16"),
        ("gpu", ["7.5"], "float16"),  # a T4
        ("gpu", ["8.0", "7.0"], "float16"),
        ("gpu", ["gfx90a"], "bfloat16"),  # another maker's
    ],
)
def test_auto_is_what_every_device_multiplies(monkeypatch, platform, capabilities, dtype):
    devices = [
        SimpleNamespace(platform=platform, **({"compute_capability": each} if each else {}))
        for each in capabilities
    ]
    fake = SimpleNamespace(devices=lambda: devices, default_backend=lambda: platform)
    monkeypatch.setattr(probe, "jax", fake)
    assert probe.fast_dtype() == dtype


def test_the_peak_of_a_cpu_is_measured():
    assert 1e8 < peak_flops("float32", 8) < 1e15
