"""training/report.py: what is written, and when."""

import dataclasses
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest

from neo_jax.errors import NeoError
from neo_jax.model.flops import flops_per_token
from neo_jax.training import report as report_module
from neo_jax.training.report import Evaluation, Report

BYTES = 2.5  # of a token


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, and a device of 1e9 FLOP/s."""
    now = [0.0]
    monkeypatch.setattr(report_module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report_module, "peak_flops", lambda dtype, num_devices: 1e9)
    return now


@pytest.fixture
def config(config):
    Path(config.output).mkdir()
    return dataclasses.replace(config, log_every=2)


def lines(config):
    return list(map(json.loads, (Path(config.output) / "metrics.jsonl").read_text().splitlines()))


def values(step):
    return {"loss": jnp.float32(step / 2), "skipped_in_a_row": jnp.int32(0)}


def test_steps_are_reported_one_late_and_all_at_the_end(config, clock):
    with Report(config, 0, BYTES) as report:
        for step in range(1, 6):
            clock[0] += 0.5
            report.step(step, values(step))
            assert [line["step"] for line in lines(config)] == [2, 4][: (step - 1) // 2]
        clock[0] += 0.5
        report.step(6, values(6))
    assert [(line["step"], line["loss"]) for line in lines(config)] == [
        (2, 1.0),
        (4, 2.0),
        (6, 3.0),
    ]


@pytest.mark.parametrize(("warmup", "says"), [(3, False), (4, True), (3000, True)])
def test_a_warm_up_of_most_of_a_run_is_reported(config, capsys, warmup, says):
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=warmup)
    with Report(dataclasses.replace(config, steps=6, optimizer=optimizer), 0, BYTES):
        pass
    line = f"optimizer.warmup_steps {warmup} is more than half of 6 steps: the learning rate rises"
    assert (line in capsys.readouterr().err) == says


def test_speed_is_tokens_over_time_without_evaluations(config, clock, capsys):
    with Report(config, 0, BYTES) as report:
        for step in (1, 2):
            clock[0] += 0.25
            report.step(step, values(step))
        report.flush()
        clock[0] += 1000  # an evaluation
        report.evaluation(2, Evaluation(2.5, 1.25))
        for step in (3, 4):
            clock[0] += 2
            report.step(step, values(step))
    fast, evaluation, slow = lines(config)
    tokens = 2 * config.batch_size * config.sequence_length
    assert fast["tokens_per_second"] == tokens / 0.5
    assert slow["tokens_per_second"] == tokens / 4
    assert evaluation == {"step": 2, "eval_loss": 2.5, "eval_bits_per_byte": 1.25}
    flops = flops_per_token(config.model, config.sequence_length)
    assert slow["mfu"] == pytest.approx(tokens / 4 * flops / 1e9, rel=1e-5)
    assert slow["bits_per_byte"] == pytest.approx(2 / math.log(2) / BYTES, rel=1e-5)
    assert slow["memory_bytes"] > 1e8
    err = capsys.readouterr().err
    assert "step 2/6: loss 1.0000  1,024 tokens/s" in err
    assert "step 2: held-out loss 2.5000 nats a token, 1.2500 bits a byte" in err


def test_a_run_that_only_skips_ends_with_advice(config, clock):
    config = dataclasses.replace(config, max_skipped=4)
    with pytest.raises(NeoError) as error:
        skip(config, clock, steps=6)
    assert str(error.value).startswith("the last 4 steps to step 4 had no finite gradients")
    assert "lower optimizer.learning_rate" in str(error.value)
    assert [line["step"] for line in lines(config)] == [2]


def skip(config, clock, steps):
    with Report(config, 0, BYTES) as report:
        for step in range(1, steps + 1):
            clock[0] += 1
            report.step(step, values(step) | {"skipped_in_a_row": jnp.int32(step)})


def test_an_error_closes_the_file_too(config, clock):
    report = Report(config, 0, BYTES)
    with pytest.raises(KeyboardInterrupt), report:
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="closed file"):
        report.evaluation(1, Evaluation(1.0, 1.0))


def test_a_run_without_log_lines_in_reach_still_tells_its_last_step(config, clock):
    with Report(dataclasses.replace(config, log_every=100), 4, BYTES) as report:
        for step in (5, 6):
            clock[0] += 1
            report.step(step, values(step))
    assert [line["step"] for line in lines(config)] == [6]


def test_whatever_a_step_measures_is_written(config, clock):
    with Report(config, 0, BYTES) as report:
        clock[0] += 1
        report.step(2, {**values(2), "skipped": jnp.int32(1)})
    assert lines(config)[0]["skipped"] == 1


def test_texts_are_written_and_shown_as_they_are(config, clock, capsys):
    config = dataclasses.replace(config, prompts=("[red]", "b"))
    for start_step in (0, 2):  # a run that goes on writes the later ones again
        with Report(config, start_step, BYTES) as report:
            for step in (2, 4)[start_step // 2 :]:
                report.samples(step, [" fox\n", " dog"])
    found = map(json.loads, (Path(config.output) / "samples.jsonl").read_text().splitlines())
    assert [tuple(line.values()) for line in found] == [
        (step, prompt, text)
        for step in (2, 4)
        for prompt, text in (("[red]", " fox\n"), ("b", " dog"))
    ]
    assert "step 2: '[red]' goes on ' fox\\n'" in capsys.readouterr().err


def test_a_missing_matplotlib_is_one_line(config, clock, capsys, monkeypatch):
    monkeypatch.setattr(report_module.LossPlot, "available", False)
    with Report(config, 0, BYTES):
        pass
    assert (
        capsys.readouterr().err == "no loss.png without matplotlib; pip install 'neo_jax[plot]'\n"
    )
