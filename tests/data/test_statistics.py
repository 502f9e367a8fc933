"""data/statistics.py: lengths of documents, and their picture."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_jax.data import statistics as module
from neo_jax.data.statistics import draw_histogram, length_statistics


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("offsets") / "offsets.npy"


lengths = st.integers(1, 100) | st.integers(1, 2**22)


@settings(max_examples=30)
@given(st.lists(lengths, min_size=1, max_size=30), st.integers(1, 40))
def test_statistics_are_those_of_the_lengths(path, lengths, chunk):
    np.save(path, np.concatenate([[0], np.cumsum(lengths)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        found = length_statistics(path)
    assert found["median"] == min(statistics.median_low(lengths), 2**20)
    assert found["mean"] == pytest.approx(statistics.mean(lengths), abs=0.06)
    assert found["longest"] == max(lengths)
    counts = [0] * 21
    for length in lengths:
        counts[min(length.bit_length() - 1, 20)] += 1
    histogram = found["histogram"]
    assert histogram == counts[: len(histogram)]
    assert histogram[-1] > 0
    assert sum(histogram) == len(lengths)


def test_the_picture():
    picture = draw_histogram([0] * 8 + [1, 40, 1000, 0, 320], width=20)
    assert picture.splitlines() == [
        "  256 ▏ 1",
        "  512 ▉ 40",
        "1,024 ████████████████████ 1,000",
        "2,048 0",
        "4,096 ██████▌ 320",
    ]
