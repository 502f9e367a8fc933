"""tools/benchmark/report.py: figures as a table, as fields, as a picture."""

import dataclasses
import io
import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

from neo_jax.devices.chips import Chip
from neo_jax.tools.benchmark import report
from neo_jax.tools.benchmark.limits import Limits
from neo_jax.tools.benchmark.run import Measurement, Result, Setup

STEPS = [
    Measurement("prefill", 1, 256, 8e9, 1e8, 0.1, 5),
    Measurement("decode", 8, 256, 1e9, 2e8, 0.02, 5),
    Measurement("train", 8, 2048, note="out of memory"),
]


@pytest.fixture
def result(tiny):
    model, _ = tiny
    setup = Setup("tiny", model, dict, None, (), (), (), "none", 1.0)
    limits = Limits({"float32": 1e11, "bfloat16": 3e11}, {}, 2e10, "sums of 3 x 4")
    return Result(setup, limits, STEPS)


def test_the_table(result):
    text = "\n".join(report.lines(result))
    assert "measured   100 GFLOP/s in float32, 300 GFLOP/s in bfloat16; reading 20 GB/s" in text
    assert "published" not in text
    prefill, decode, train = [line.split() for line in text.splitlines()[-3:]]
    assert prefill == "prefill 1 256 100.0 2,560.0 80 GFLOP/s 80.0% 1 GB/s 5.0% -".split()
    assert decode == "decode 8 256 20.0 400.0 50 GFLOP/s 50.0% 10 GB/s 50.0% -".split()
    assert train == "train 8 2048 out of memory".split()


def test_fields(result):
    fields = json.loads(json.dumps(report.describe(result), allow_nan=False))
    prefill, _, train = fields["measurements"]
    assert fields["limits"]["bytes_per_second"] == 2e10
    assert fields["published"] == {"flops_per_second": None, "bytes_per_second": None}
    assert prefill["share_of_products"] == pytest.approx(0.8)
    assert prefill["share_of_memory"] == pytest.approx(0.05)
    assert prefill["tokens_per_second"] * prefill["seconds"] == pytest.approx(prefill["tokens"])
    assert train["seconds"] is train["mfu"] is None
    assert train["note"] == "out of memory"


def test_mfu_is_a_share_of_what_is_published_of_all_devices(result, monkeypatch):
    monkeypatch.setattr("neo_jax.tools.benchmark.run.chip", lambda kind: Chip(2e11))
    assert result.utilisation(STEPS[0]) == pytest.approx(0.4)
    assert "published  200 GFLOP/s" in "\n".join(report.lines(result))
    assert report.describe(result)["measurements"][0]["mfu"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.5 B/s"), (999, "999 B/s"), (2.5e9, "2.5 GB/s"), (4e15, "4 PB/s")]
)
def test_rates_in_words(value, text):
    assert report.rate_text(value, "B/s") == text


def area(picture, color):
    image = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(image - rgb).sum(-1) < 30).sum())


def test_the_roofline_shows_each_step_that_ran(result):
    whole = report.draw(result)
    without = report.draw(result._replace(measurements=STEPS[1:]))
    assert area(whole, "#0b6e99") > 100
    assert area(without, "#0b6e99") == 0
    assert area(without, "#c8553d") > 100
    assert area(whole, "#5b8c3a") == 0  # did not run
    assert area(whole, "#222222") > 1500  # the limits


def test_labels_do_not_cover_each_other(result):
    steps = [dataclasses.replace(STEPS[0], batch=batch) for batch in range(11, 19)]
    apart = area(report.draw(result._replace(measurements=steps)), "#0b6e99")
    one = area(report.draw(result._replace(measurements=steps[:1])), "#0b6e99")
    assert apart > 2 * one


def test_nothing_that_ran_is_drawn_too(result):
    assert report.draw(result._replace(measurements=STEPS[2:])).startswith(b"\x89PNG")
    assert math.isnan(STEPS[2].intensity)
    assert jax.devices()[0] in result.setup.devices
