"""training/sinks.py: files of a run that is resumed, and those of other tools."""

import contextlib
import dataclasses
import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from neo_jax.errors import NeoError
from neo_jax.training.sinks import LineFile, LossPlot, draw, open_sinks


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


def test_texts_stay_as_they_are(tmp_path):
    with contextlib.closing(LineFile(tmp_path / "samples.jsonl", 0)) as file:
        file.write(3, prompt="a", text='é "\n')
    assert read(tmp_path / "samples.jsonl") == [{"step": 3, "prompt": "a", "text": 'é "\n'}]


def test_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    file = LineFile(path, 0)
    file.close()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(file, "_file", full)
        with pytest.raises(NeoError, match=rf"cannot write {path} \(No space left on device\)"):
            file.write(1, loss=1.0)
        monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # what it still holds
        with pytest.raises(OSError, match="No space"):
            full.close()


@pytest.fixture
def output(config):
    path = Path(config.output)
    path.mkdir()
    return path


def test_tensorboard(config, output):
    config = dataclasses.replace(config, tensorboard=True)
    [sink] = open_sinks(config, 0)
    with contextlib.closing(sink):
        sink.write(10, loss=2.5, gradient_norm=1.0)
        sink.sync()
    [path] = (output / "tensorboard").iterdir()
    content, events = path.read_bytes(), []
    while content:  # of each record: its length, a checksum, the event, a checksum
        length = int.from_bytes(content[:8], "little")
        events.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    found = [(event.step, v.tag, v.simple_value) for event in events for v in event.summary.value]
    assert found == [(10, "loss", 2.5), (10, "gradient_norm", 1.0)]


class Service(ModuleType):
    """What wandb is asked."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.runs, self.logged, self.finished, self.refuses = [], [], 0, False

    def init(self, **options):
        if self.refuses:
            raise RuntimeError("no API key\nconfigured")
        self.runs.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def service(monkeypatch):
    service = Service()
    monkeypatch.setitem(sys.modules, "wandb", service)
    return service


def test_wandb_goes_on_with_the_run(config, output, service):
    config = dataclasses.replace(config, wandb="neo")
    for start_step in (0, 3, 0):  # the last one begins anew
        [sink] = open_sinks(config, start_step)
        with contextlib.closing(sink):
            sink.write(start_step + 1, loss=2.5)
            sink.sync()
    first, resumed, other = service.runs
    assert first == resumed
    assert (first["project"], first["resume"]) == ("neo", "allow")
    assert first["config"]["model"]["embed_dim"] == 32
    assert first["id"] != other["id"]
    assert service.logged == [{"step": step, "loss": 2.5} for step in (1, 4, 1)]
    assert service.finished == 3


def test_wandb_that_does_not_let_us_in(config, output, service):
    service.refuses = True
    with pytest.raises(NeoError, match=r"in 'neo' \(no API key configured\); run wandb login, set"):
        open_sinks(dataclasses.replace(config, wandb="neo"), 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wandb": "neo"}, r"wandb, which is not installed; pip install 'neo_jax\[wandb\]'"),
        ({"tensorboard": True}, r"tensorboardX, .*; pip install 'neo_jax\[tensorboard\]'"),
    ],
)
def test_packages_that_are_not_there(config, output, monkeypatch, fields, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NeoError, match=message):
        open_sinks(dataclasses.replace(config, **fields), 0)


def test_nothing_is_opened_that_nobody_asked_for(config, output):
    assert open_sinks(config, 0) == []
    assert list(output.iterdir()) == []


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
