"""checkpoints/options.py: one declaration of how a model is loaded."""

import dataclasses

import pytest

import neo_jax
from neo_jax.checkpoints.options import LoadOptions
from neo_jax.cli.options import ModelOptions
from neo_jax.cli.plan import StepOptions


def names(options):
    return {field.name for field in dataclasses.fields(options)}


def test_the_verbs_declare_no_option_again():
    assert names(ModelOptions) == names(LoadOptions)
    assert issubclass(StepOptions, LoadOptions)
    assert not ModelOptions().is_split
    assert ModelOptions(rules="tensor").is_split


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dtype": "half"},
            "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not 'half'.",
        ),
        ({"quantize": "int4"}, "quantize must be 'none' or 'int8', not 'int4'."),
        (
            {"cache_dtype": None},
            "cache_dtype must be 'auto', 'float32', 'bfloat16', 'float16' or 'int8', not",
        ),
        (
            {"kernel": "fast"},
            "kernel must be 'auto', 'dense', 'single', 'blocked', 'splash', 'splash-256', "
            "'splash-1024' or 'cudnn', not 'fast'.",
        ),
    ],
)
def test_values_that_no_option_takes(options, message):
    for refuses in (LoadOptions, neo_jax.load):
        with pytest.raises(neo_jax.NeoError) as error:
            refuses(**options)
        assert str(error.value).startswith(message)
