"""neo_jax/training/sinks.py: files of a run that is resumed, and those of other tools."""

import contextlib
import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from neo_jax.errors import NeoError
from neo_jax.training.sinks import LineFile, open_sinks


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_new_file_takes_a_line_a_call(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with contextlib.closing(LineFile(path, 0)) as file:
        file.write(1, loss=1.23456789, speed=123456.789)
        assert read(path) == [{"step": 1, "loss": 1.23457, "speed": 123457.0}]
        file.write(2, loss=0.5)
        assert read(path)[1:] == [{"step": 2, "loss": 0.5}]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 10, "loss": 3.0}, {"step": 20, "loss": 2.0}, {"step": 20, "eval_loss": 2.5}]
    later = [{"step": 21, "loss": 1.0}, {"step": 30, "loss": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *later])
    path.write_text(text + '{"note": 1}\n{"step": 40, "lo')  # cut off by a kill
    with contextlib.closing(LineFile(path, 20)) as file:
        assert read(path) == lines
        file.write(21, loss=1.5)
    assert read(path) == [*lines, {"step": 21, "loss": 1.5}]
    LineFile(path, 0).close()
    assert read(path) == []
