"""neo-jax bench, on a tiny checkpoint."""

import json

import pytest

from neo_jax.cli.bench import Options, _setup
from neo_jax.cli.options import ModelOptions
from neo_jax.tools.benchmark import limits


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(limits, "_SIZES", (64,))
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)


def test_a_table_and_a_picture(run, checkpoints, tmp_path):
    picture = tmp_path / "roofline.png"
    status, out, err = run(
        "bench", "--model", checkpoints["bare"], "--quick", "--batch", "2", "--picture", picture
    )
    assert status == 0, err
    assert picture.read_bytes().startswith(b"\x89PNG")
    kinds = [line.split()[:3] for line in out.splitlines()[-3:]]
    assert kinds == [["prefill", "2", "64"], ["decode", "2", "64"], ["train", "2", "64"]]
    assert "measured" in out
    assert "prefill 2 x 64: " in err


def test_json_on_a_mesh(succeed, checkpoints):
    fields = json.loads(
        succeed(
            "bench", "--model", checkpoints["bare"], "--mesh", "data=4,model=2", "--json",
            "--batch", "3", "--length", "16", "--steps", "decode", "--dtype", "bfloat16",
        )
    )  # fmt: skip
    (step,) = fields["measurements"]
    assert fields["mesh"] == {"data": 4, "model": 2}
    assert fields["devices"] == 8
    assert fields["dtype"] == "bfloat16"
    assert step["batch"] == 4  # what three rows are padded to
    assert step["tokens_per_second"] * step["seconds"] == pytest.approx(4)
    assert all(rate > 0 for rate in fields["limits"]["flops_per_second"].values())


def test_presets_are_drawn():
    setup = _setup(Options(model=ModelOptions(model="gpt-neo-125m"), quick=True))
    assert setup.name == "gpt-neo-125m, random weights"
    assert setup.lengths == (256,)
    assert setup.seconds == 60
    assert _setup(Options(model=ModelOptions("gpt-neo-1.3b"))).lengths == (256, 2048)


def test_errors_are_one_line(fail, checkpoints, tmp_path):
    bare = ("bench", "--model", checkpoints["bare"])
    assert "16 to 64 tokens" in fail(*bare, "--length", "65", status=2)
    assert "at least 1" in fail(*bare, "--batch", "0", status=2)
    assert "models of floats" in fail(*bare, "--quantize", "int8", status=2)
    assert "split nothing" in fail(*bare, "--mesh", "context=8")
    assert "no published model" in fail("bench", "--model", "gpt-neo-1b")
    assert "cannot write" in fail(*bare, "--picture", tmp_path / "no" / "a.png")
