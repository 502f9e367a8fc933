"""training/plot.py: loss.png, there and current."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neo_jax.training.plot import LossPlot, draw

LINES = [
    *({"step": step, "loss": 8 - step / 100} for step in range(10, 500, 10)),
    *({"step": step, "eval_loss": 7 - step / 100, "eval_bits_per_byte": 1} for step in (200, 400)),
]


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def test_the_training_loss_is_light_and_the_held_out_loss_dark():
    def area(lines):
        image = pixels(draw(lines))
        light, dark = ((158, 202, 225), (8, 48, 107))
        return [int((np.abs(image - color).sum(-1) < 30).sum()) for color in (light, dark)]

    empty, training, both = area([]), area(LINES[:-2]), area(LINES)
    assert training[0] > empty[0] + 200
    assert training[1] == empty[1]
    assert both[1] > training[1] + 200


def test_a_plot_is_drawn_beside_the_run_and_once_more_at_its_end(tmp_path):
    lines = LINES[:10]
    plot = LossPlot(tmp_path / "loss.png", lambda: lines)
    plot.sync()
    plot.sync()  # one at a time
    lines = LINES
    plot.close()
    assert (pixels((tmp_path / "loss.png").read_bytes()) == pixels(draw(LINES))).all()


def test_a_picture_that_cannot_be_written_stops_nothing():
    plot = LossPlot(Path("/dev/full"), lambda: LINES)
    plot.sync()
    plot.close()


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(LossPlot, "available", False)
    plot = LossPlot(tmp_path / "loss.png", lambda: pytest.fail("reads"))
    plot.sync()
    plot.close()
    assert list(tmp_path.iterdir()) == []
