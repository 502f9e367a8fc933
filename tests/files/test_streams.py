"""files/streams.py: what libraries print below Python."""

import os

from neo_jax.devices import probe
from neo_jax.files.streams import muted


def test_nothing_is_printed_meanwhile_and_all_before_and_after(capfd):
    os.write(2, b"before ")
    with muted():
        os.write(2, b"meanwhile ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"


def test_where_jax_looks_for_devices_libraries_print_nothing(capfd, monkeypatch):
    monkeypatch.setattr(probe.jax, "devices", lambda: os.write(2, b"no TPU"))
    probe.start.__wrapped__()
    assert capfd.readouterr().err == ""
