"""neo-jax eval --perturb: what noise does to texts, and to what a model is evaluated on."""

import functools
import json
import types
import unicodedata

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager

import neo_jax
from neo_jax.cli import main
from neo_jax.errors import NeoError
from neo_jax.evaluation import noise as module
from neo_jax.evaluation import noisy_tasks
from neo_jax.evaluation import tasks as running
from neo_jax.evaluation.noise import NoiseOptions, perturb
from neo_jax.evaluation.robustness import measure_texts
from neo_jax.evaluation.texts import Total, measure, read_documents

NOISES = ("typos", "homoglyphs", "case", "spaces")
LONG = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. " * 60


@pytest.mark.parametrize("noise", NOISES)
def test_the_rate_is_the_share_that_changes(noise):
    assert perturb(LONG, noise, 0) == LONG
    found = perturb(LONG, noise, 0.2)
    assert found == perturb(LONG, noise, 0.2) != perturb(LONG, noise, 0.2, seed=1)
    letters = sum(char.isalpha() for char in LONG)
    if noise in ("homoglyphs", "case"):
        can = letters
        if noise == "homoglyphs":
            can = sum(char in module._LOOK_ALIKES for char in LONG)
        changed = sum(a != b for a, b in zip(LONG, found, strict=True))
        assert changed / can == pytest.approx(0.2, abs=0.02)
        low = perturb(LONG, noise, 0.1)
        both = zip(LONG, low, found, strict=True)
        assert all(b == c for a, b, c in both if a != b)  # more noise adds to less
    elif noise == "typos":
        # A quarter each is left out and doubled: as long as before, but for chance.
        assert abs(len(found) - len(LONG)) < 60
        assert 0.15 < _distance(LONG[:1000], perturb(LONG[:1000], noise, 0.2)) / 800 < 0.3
    else:
        assert found.replace(" ", "") == LONG.replace(" ", "")
        words, here = LONG.split(), found.split(" ")
        assert len(here) == pytest.approx(len(words), rel=0.05)  # as many spaces go as come
        assert len(set(here) - set(words)) > 20


def _distance(a, b):
    """Levenshtein's."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_all_of_a_text_can_change():
    assert perturb("Aeiou xyz", "case", 1) == "aEIOU XYZ"
    assert perturb("ape", "homoglyphs", 1) == "\u0430\u0440\u0435"
    for latin, other in module._LOOK_ALIKES.items():
        assert unicodedata.name(other).startswith("CYRILLIC")
        assert latin != other
        assert latin.islower() == other.islower()
    assert perturb("it is a", "spaces", 1) == "i ti sa"


def test_neighbours_are_those_of_a_keyboard():
    assert set(module._NEIGHBOURS["g"]) == set("fhtyvb")
    assert set(module._NEIGHBOURS["q"]) == set("wa")
    for letter, near in module._NEIGHBOURS.items():
        assert all(letter in module._NEIGHBOURS[other] for other in near)
    edits = {perturb("fog", "typos", 0.4, seed) for seed in range(300)}
    assert {"fog", "ofg", "og", "ffog", "fgo", "foog"} <= edits  # swapped, left out, doubled
    assert edits & {f"{other}og" for other in module._NEIGHBOURS["f"]}


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.text(), st.sampled_from(NOISES), st.floats(0, 1), st.integers(0, 9))
def test_any_text_has_noise(text, noise, rate, seed):
    found = perturb(text, noise, rate, seed)
    assert len(found) <= 3 * len(text)
    if noise == "spaces":
        assert found.replace(" ", "") == text.replace(" ", "")
    elif not any(char.isalpha() for char in text):
        assert found == text


def test_rates_are_shares():
    assert NoiseOptions(rates=(0.2, 0, 0.2)).rates == (0.0, 0.2)
    for rates in ((), (1.5,), (-0.1,)):
        with pytest.raises(NeoError, match="rates must be shares from 0 to 1"):
            NoiseOptions(rates=rates)


def test_texts_by_rate(checkpoints, text, tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text(text)
    options = ["eval", "--text", str(path), "--model", str(checkpoints["bytes"])]
    options += ["--perturb", "case", "homoglyphs", "--rates", "0", "0.3"]
    assert main([*options, "--json", "--picture", str(tmp_path / "curve.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "curve.png").stat().st_size > 5000
    curves = {(curve["noise"], curve["measure"]): curve["values"] for curve in found["curves"]}
    assert found["rates"] == [0, 0.3]
    lm, plain, noisy = neo_jax.load(checkpoints["bytes"]), Total(), Total()
    for _, one in measure(lm, read_documents([str(path)])):
        plain.add(one)
    # Counted over the bytes and words of the text as it is.
    (document,) = read_documents([str(path)])
    changed = document._replace(text=perturb(text, "case", 0.3))
    for _, one in measure(lm, [changed]):
        noisy.add(one)
    assert curves["case", "bits/byte"] == pytest.approx([plain.bits_per_byte, noisy.bits_per_byte])
    assert noisy.num_bytes == plain.num_bytes == len(text.encode())
    assert curves["homoglyphs", "bits/byte"][0] == curves["case", "bits/byte"][0]
    values = measure_texts(lm, [document], "case", 0.3, seed=5)
    assert values["ppl/word"] != curves["case", "ppl/word"][1]


def test_contexts_of_tasks_have_noise(tasks, checkpoints, monkeypatch, capsys):
    """Continuations have none, and nothing else changes."""
    seen = []
    encode_pair = noisy_tasks.NeoLM._pair

    def watch(self, request):
        seen.append(request.args)
        return encode_pair(self, request)

    monkeypatch.setattr(noisy_tasks.NeoLM, "_pair", watch)
    # To index all tasks of the harness takes it many seconds.
    own = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(running, "open_tasks", lambda folders: own(include_path=folders))
    options = ["eval", "--tasks", "choices", "--include-path", str(tasks), "--model"]
    options += [str(checkpoints["bytes"]), "--perturb", "spaces", "--rates", "0", "0.5"]
    options += ["--limit", "2"]
    assert main([*options, "--cache", "none"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["0", "0.5"]
    assert {row[0] for row in rows[1:]} == {"choices"}
    plain, noisy = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert noisy == [(perturb(a, "spaces", 0.5), b) for a, b in plain] != plain
    whole = types.SimpleNamespace(task_name="whole", args=("A text.",))
    model = noisy_tasks.NoisyLM(neo_jax.load(checkpoints["bytes"]), "case", 0.5, 0, cache="none")
    with pytest.raises(NeoError, match="task 'whole' scores whole texts"):
        model.loglikelihood_rolling([whole])
    monkeypatch.setattr(noisy_tasks.NeoLM, "generate_until", lambda self, requests, _: requests)
    whole.args = ("A text.", {"until": ["a"]})
    assert model.generate_until([whole])[0].arguments == (
        perturb("A text.", "case", 0.5),
        {"until": ["a"]},
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "model-card"], "--perturb goes with --text or --tasks"),
        (["--text", "a.txt", "--by-position"], "--by-position goes without --perturb"),
        (["--text", "a.txt", "--rates", "2"], "rates must be shares from 0 to 1"),
    ],
)
def test_what_has_no_noise(args, message, capsys):
    assert main(["eval", "--perturb", "case", *args]) == 2
    assert message in capsys.readouterr().err
