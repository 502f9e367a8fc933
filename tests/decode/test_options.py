"""decode/options.py: what options may say, and what becomes of them as arrays."""

import dataclasses

import numpy as np
import pytest

from neo_jax.decode.options import (
    Room,
    SamplingOptions,
    Settings,
    make_settings,
    room_for,
    stack_settings,
)
from neo_jax.errors import NeoError


def test_settings_of_many_rows():
    options = SamplingOptions(0.5, 3, 0.25, 0.125, 1.5, 2, 4, seed=11)
    made = make_settings(options, [11, 2**32 - 1])
    assert [leaf.tolist() for leaf in made] == [
        [0.5, 0.5], [3, 3], [0.25, 0.25], [0.125, 0.125], [1.5, 1.5], [2, 2], [4, 4],
        [11, 2**32 - 1], [-1, -1], [-1, -1], np.full((2, 16, 4), -1).tolist(),
        np.zeros((2, 16)).tolist(), [0, 0], [0, 0], [False, False], [[], []], [[], []], [[], []],
    ]  # fmt: skip
    assert [leaf.dtype for leaf in made] == [
        np.float32, np.int32, np.float32, np.float32, np.float32, np.int32, np.int32, np.uint32,
        np.int32, np.int32, np.int32, bool, np.float32, np.float32, bool, np.int32, np.float32,
        bool,
    ]  # fmt: skip
    assert all(leaf.shape[0] == 0 for leaf in make_settings(options, []))
    both = stack_settings([options, SamplingOptions(seed=5)])
    assert [leaf.tolist()[0] for leaf in both] == [leaf.tolist()[0] for leaf in made]
    plain = {f.name for f in dataclasses.fields(SamplingOptions) if f.default != ()}
    others = {"bans", "bans_first", "bias_ids", "biases", "alternatives"}
    assert set(Settings._fields) == plain | others


def test_there_is_room_in_few_sizes():
    """So that requests share programs; what few requests have fits the smallest."""
    few = SamplingOptions(suppress_tokens=range(16), bad_words_ids=[])
    many = SamplingOptions(bad_words_ids=[range(5), *([i] for i in range(16))])
    assert room_for([SamplingOptions(), few]) == (16, 4, 0, 0)
    assert room_for([few, many]) == (32, 8, 0, 0)
    assert room_for([]) == (16, 4, 0, 0)
    assert [room_for([biased(n)]).biases for n in (1, 16, 17, 300)] == [16, 16, 32, 512]
    assert stack_settings([few], Room(32, 8)).bans.shape == (1, 32, 8)


def biased(count):
    return SamplingOptions(logit_bias=dict.fromkeys(range(count), 1.0))


def test_biases_and_alternatives_have_a_row_each():
    options = [biased(2), SamplingOptions(logit_bias=[(7, -100)]), SamplingOptions()]
    made = stack_settings(options, Room(biases=3, alternatives=2), [0, 2, 1])
    assert made.bias_ids.tolist() == [[0, 1, -1], [7, -1, -1], [-1, -1, -1]]
    assert made.biases.tolist() == [[1, 1, 0], [-100, 0, 0], [0, 0, 0]]
    assert made.alternatives.tolist() == [[False, False], [True, True], [True, False]]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -0.1}, "temperature must lie between 0 and 1e.06, not be -0.1"),
        ({"temperature": float("nan")}, "temperature must lie between 0 and 1e.06, not be nan"),
        ({"temperature": 1e300}, "temperature must lie between 0 and 1e.06, not be 1e.300"),
        ({"top_k": -1}, "top_k must be a whole number from 0 .off. to 2..31 - 1, not -1"),
        (
            {"top_k": 2**31},
            "top_k must be a whole number from 0 .off. to 2..31",
        ),
        ({"top_p": 0.0}, "top_p must lie in .0, 1., not 0.0; 1 is off"),
        ({"top_p": 1.01}, "top_p must lie in"),
        ({"top_p": float("nan")}, "top_p must lie in"),
        ({"min_p": -0.1}, "min_p must lie in .0, 1., not -0.1; 0 is off"),
        ({"min_p": float("nan")}, "min_p must lie in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and at most"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size must be a whole number from 0"),
        ({"min_new_tokens": -2}, "min_new_tokens must be a whole number from 0"),
        ({"seed": -1}, "seed must be a whole number from 0 to"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to"),
        ({"suppress_tokens": 5}, "suppress_tokens must be a list, not 5"),
        ({"suppress_tokens": [True]}, "an id of suppress_tokens must be a whole number, not True"),
        ({"begin_suppress_tokens": [3, -2]}, "begin_suppress_tokens holds -2, which is no id"),
        ({"bad_words_ids": [5]}, "bad_words_ids must be a list, not 5"),
        ({"bad_words_ids": [[]]}, "bad_words_ids holds a word of no ids; leave it out"),
        ({"forced_eos_token_id": -2}, "forced_eos_token_id must be an id, or -1 for none, not -2"),
        (
            {"forced_bos_token_id": 4, "suppress_tokens": [3, 4]},
            "forced_bos_token_id 4 is one of suppress_tokens; leave out one of them",
        ),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(NeoError, match=message):
        SamplingOptions(**option)
