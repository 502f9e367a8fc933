"""Devices by their names."""

import contextlib
import os

import pytest

from neo_jax.errors import NeoError
from neo_jax.tools.plan.topology import find_topology

pytestmark = pytest.mark.tpu_compiler


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("v2:2x2", 8, "TPU v2"),  # half a chip is a device
        ("v4:2x2x1", 4, "TPU v4"),  # a chip is one
        ("v5e:1x1", 1, "TPU v5 lite"),
        ("v5e:16x16", 256, "TPU v5 lite"),
        ("v5p:8x8x8", 512, "TPU v5"),
        ("v6e:2x4", 8, "TPU v6 lite"),
        ("tpu7x:2x2x1", 8, "TPU7x"),
        ("2*v5e:4x4", 32, "TPU v5 lite"),
        ("cpu:4", 4, "cpu"),
    ],
)
def test_devices(name, number, kind):
    topology = find_topology(name)
    assert len(topology.devices) == number
    assert {device.device_kind for device in topology.devices} == {kind}
    assert topology.is_here == (kind == "cpu")
    if kind != "cpu":
        assert topology.chip.peak_flops > 1e13


def test_slices_are_told_apart():
    assert {device.slice_index for device in find_topology("2*v5e:4x4").devices} == {0, 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "'v5e' is not a topology; write for example v5e:4x4"),
        ("v5e:4x", "is not a topology"),
        ("v5e:0x4", "is not a topology"),
        ("0*v5e:4x4", "is not a topology"),
        ("cpu:0", "is not a topology"),
        ("cpu:4x4", "is not a topology"),
        ("v5ee:4x4", "no TPU is called 'v5ee'. Did you mean 'v5e'?"),
        ("v5e:3x3", "there is no topology v5e:3x3"),
        ("v5e:4", "there is no topology v5e:4 "),
        ("cpu:9", r"cpu:9 needs 9 CPU devices, and JAX was started with 8; call jax.config.update"),
    ],
)
def test_what_is_not_there(name, message):
    with pytest.raises(NeoError) as error:
        find_topology(name)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NeoError, match=r"pip install 'neo_jax\[tpu\]'"):
        find_topology("v5e:4x4")


@pytest.mark.parametrize("name", ["v5e:1x1", "v5e:3x3"])
def test_the_environment_stays_as_it_is(monkeypatch, name):
    """Else `distributed.join` would later take this for a TPU host that is alone."""
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    monkeypatch.setenv("TPU_MIN_LOG_LEVEL", "0")
    before = dict(os.environ)
    with contextlib.suppress(NeoError):
        find_topology(name)
    assert dict(os.environ) == before
