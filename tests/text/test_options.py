"""text/options.py: one declaration of every option, and what options cannot say."""

import dataclasses

import numpy as np
import pytest

import neo_jax
from neo_jax.cli.generate import Options
from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.text.options import TextOptions, names, read_options

NEW = 24
KINDS = (SamplingOptions, BeamOptions, TextOptions)


@pytest.fixture(scope="module")
def lm(checkpoints):
    return neo_jax.load(checkpoints["bytes"])


def test_methods_and_the_command_line_take_what_is_declared(capsys):
    """Each field of the three classes, with its default; and nothing that is not one of them."""
    with pytest.raises(SystemExit):
        neo_jax.cli.main(["generate", "--help"])
    help_ = capsys.readouterr().out
    for kind in KINDS:
        for field in dataclasses.fields(kind):
            assert f"--{field.name.replace('_', '-')}" in help_
            if field.name != "num_samples":  # `generate` returns one text a prompt
                sampling, others = read_options({field.name: field.default})
                assert sampling == SamplingOptions()
                assert set(others) <= {field.name, "beams"}
    command = Options()
    for made in (SamplingOptions(), BeamOptions(), TextOptions()):
        holder = {SamplingOptions: command.sampling, BeamOptions: command.beams}
        for name in names(type(made)):
            assert getattr(holder.get(type(made), command), name) == getattr(made, name)


def test_stops_are_one_text_several_or_none():
    assert TextOptions(stop="a").stop == ("a",)
    assert TextOptions(stop=["a", "b"]).stop == ("a", "b")
    assert TextOptions(stop=None).stop == TextOptions(stop="").stop == ()


def test_unknown_options_of_samples_suggest_one_that_does(lm):
    with pytest.raises(NeoError, match=r"unknown option 'batchsize'\. Did you mean 'batch_size'"):
        lm.sample(["The fox"], NEW, batchsize=3)
    with pytest.raises(NeoError, match="unknown option 'temperature'"):
        lm.sample(["The fox"], NEW, temperature=1)  # of `sampling`


def test_each_prompt_may_have_its_own_options(lm):
    options = [SamplingOptions(temperature=0.0), SamplingOptions(temperature=1.3, seed=8)]
    both = lm.sample(["The fox", "Call me"], NEW, sampling=options)
    for prompt, option, sample in zip(["The fox", "Call me"], options, both, strict=True):
        assert lm.sample([prompt], NEW, sampling=option)[0].ids == sample.ids
    with pytest.raises(NeoError, match="1 sampling options do not match 2 prompts"):
        lm.sample(["a", "b"], NEW, sampling=options[:1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"stop": [1]}, r"stop must be a text or a list of texts, not \[1\]"),
        ({"stop": 1}, "stop must be a text or a list of texts, not 1"),
        ({"num_samples": 0}, "num_samples must be at least 1, not 0"),
        ({"num_samples": 10**9}, "1000000000 samples of a prompt, .* may take .* GB of this mach"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"batch_size": "a"}, "batch_size must be a whole number, not 'a'"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, not 2.5"),
        ({"on_overflow": "trunc"}, "on_overflow must be 'error' or 'truncate', not 'trunc'"),
        ({"sampling": {"seed": 1}}, "sampling must be SamplingOptions, or a list, not {'seed': 1}"),
        ({"sampling": [1]}, r"sampling must be SamplingOptions, or a list, not \[1\]"),
        ({"beams": 4}, "beams must be BeamOptions, not 4"),
    ],
)
def test_requests_that_cannot_be_met(lm, options, message):
    with pytest.raises(NeoError, match=message):
        lm.sample(["The fox"], **{"max_new_tokens": NEW, **options})


def test_numbers_of_numpy_and_no_stop_are_fine(lm):
    plain = lm.generate("The fox", NEW, seed=3, temperature=0.5)
    same = {"seed": np.uint32(3), "temperature": np.float32(0.5), "stop": None}
    assert lm.generate("The fox", np.int64(NEW), **same) == plain
    assert "".join(lm.stream("The fox", NEW, **same)) == plain
