"""Absurd sizes are refused by arithmetic, before anything is allocated or compiled."""

import dataclasses

import pytest

import neo_jax
from neo_jax.cli import main
from neo_jax.decode.options import BeamOptions
from neo_jax.devices import memory
from neo_jax.devices.memory import check_batch
from neo_jax.errors import NeoError
from neo_jax.sharding.rules import make_sharding
from neo_jax.text.score import Question, score_rows
from neo_jax.training.config import TrainConfig
from neo_jax.training.loop import train

HUGE = 10**30


@pytest.fixture
def small_machine(monkeypatch):
    """A megabyte: what is asked for here would fit a larger one, and not be noticed."""
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1e6)


def test_a_batch_has_as_many_tokens_as_there_are_indices():
    check_batch(2**31 - 1, 1)
    check_batch(2**20, 2**10)
    for rows, length in ((2**31, 1), (2**21, 2**10), (1, HUGE)):
        with pytest.raises(NeoError, match=f"^a batch of {rows} sequences of {length} tokens has"):
            check_batch(rows, length)


def test_a_batch_fits_the_devices_that_share_it(small_machine):
    check_batch(100, 8, 1e4)
    check_batch(100, 8, 1e4, num_devices=8)  # of a CPU: they share the machine's memory
    with pytest.raises(NeoError, match="takes at least 0 GB of 0; take fewer at a time"):
        check_batch(101, 8, 1e4)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bare"])


PROMPT = [[1, 2, 3]]


@pytest.mark.parametrize(
    "options",
    [
        {"num_samples": 500, "batch_size": 10**8},
        {"num_samples": 2, "beams": BeamOptions(num_beams=160)},
        {"num_samples": 500, "batch_size": 10**8, "draft": "prompt"},
    ],
    ids=["samples", "beams", "draft"],
)
def test_texts_that_are_written_together(lm, monkeypatch, compilations, options):
    monkeypatch.setattr(memory, "machine_bytes", lambda: 3e6)
    with compilations() as compiled, pytest.raises(NeoError, match=r"a batch of \d+ sequences"):
        lm.sample(PROMPT, 32, **options)
    assert not compiled


def test_texts_that_are_scored_together(lm, small_machine, compilations):
    rows = [Question([1] * 64, [0], [1])] * 200
    with (
        compilations() as compiled,
        pytest.raises(NeoError, match="a batch of 256 sequences of 64"),
    ):
        next(score_rows(lm.model, lm.params, rows, batch_size=HUGE))
    assert not compiled


def test_a_batch_of_training(tmp_path, monkeypatch):
    config = TrainConfig(str(tmp_path), str(tmp_path / "run"), 1, batch_size=1000, length=8)
    with pytest.raises(NeoError, match=f"a batch of {HUGE} sequences of 8 tokens has more than"):
        dataclasses.replace(config, batch_size=HUGE)
    for name in ("open_split", "_check_vocabulary"):
        monkeypatch.setattr(f"neo_jax.training.loop.{name}", lambda *_: None)
    monkeypatch.setattr("neo_jax.training.loop.with_labels", lambda config, _: config)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 1e7)
    with pytest.raises(NeoError, match="a batch of 1000 sequences of 8 tokens takes at least"):
        train(config)


def test_a_mesh_that_is_drawn():
    make_sharding("data=1048576", devices=2**20)
    with pytest.raises(NeoError, match="mesh 'data=1048577' has more than 1048576 devices"):
        make_sharding("data=1048577", devices=2**20 + 1)


@pytest.mark.parametrize(
    "command",
    [
        f"plan --topology cpu:8 --batch {HUGE}",
        f"plan --topology cpu:8 --step decode --batch {HUGE}",
        f"plan --topology cpu:8 --accumulation {HUGE}",
        f"plan --topology cpu:8 --length {HUGE}",
        "plan --topology cpu:99999",
        "plan --topology 99999*v5e:16x16",
        f"bench --quick --batch {HUGE}",
        f"bench --quick --length {HUGE}",
        f"info --mesh data={HUGE}",
        f"generate Hello --num-samples {HUGE}",
        f"generate Hello --max-new-tokens {HUGE}",
        f"generate Hello --num-beams {HUGE}",
        f"generate Hello --num-drafted {HUGE} --draft-model prompt",
        "convert here there --max-shard-gb inf",
        "convert here there --max-shard-gb 0",
        f"prepare here --output there --train-tokenizer {HUGE}",
    ],
)
def test_a_command_line(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command.split()) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("neo-jax: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
