"""Predictions against published runs: the page says what arithmetic gives, and its errors."""

import collections
import json
import statistics

import pytest

from benchmarks.validate_plans import DOCUMENT, RESULTS, describe, fitted, rows, summary, table
from neo_jax.devices.chips import CHIPS
from neo_jax.tools.plan.predict import EXPOSED

ROWS = rows()


@pytest.fixture(scope="module")
def found():
    return [describe(row) for row in ROWS]


def test_the_page_says_what_arithmetic_gives(found):
    written = json.loads(RESULTS.read_text())
    assert written["rows"] == json.loads(json.dumps(found))
    text = DOCUMENT.read_text()
    assert table(found) in text
    assert summary(found) in text


def test_few_rows_fit_and_many_do_not(found):
    assert sum(bool(row["fits"]) for row in found) <= 4
    others = [row for row in found if not row["fits"]]
    assert len(others) >= 12
    most = collections.Counter((row["model"], row["chip"]) for row in others).most_common(1)
    assert most[0][1] <= 3
    assert statistics.median(abs(row["error"]) for row in others) < 0.05


@pytest.mark.parametrize(
    ("model", "slice_", "error"),
    [
        ("GPT-3 175B", "v6e-256", 0.01),
        ("Llama 3.1 70B", "v6e-256", 0.03),
        ("MaxText 128B", "v5p-256", 0.02),
        ("MaxText 16B", "v5e-256", 0.12),
        ("GPT-2 1.4B", "v3-256", 0.03),
        ("Llama 3.1 405B", "tpu7x-256", 0.1),
    ],
)
def test_how_far_single_runs_are_off(found, model, slice_, error):
    (row,) = [row for row in found if (row["model"], row["slice"]) == (model, slice_)]
    assert abs(row["error"]) <= error


def test_what_is_fitted_is_what_four_rows_say():
    told = fitted()
    assert told["waiting"] == pytest.approx(EXPOSED, abs=0.005)
    for name, kinds in {
        "products of v5e": ["TPU v5e"],
        "products of v6e": ["TPU v6e"],
        "products of v3, v4 and v5p": ["TPU v3", "TPU v4", "TPU v5p"],
    }.items():
        for kind in kinds:
            assert CHIPS[kind].reached.products == pytest.approx(told[name], abs=0.005)


def test_shapes_have_the_parameters_they_are_named_by():
    """But for MaxText's names, which are powers of two."""
    sizes = {"GPT-3 175B": 175e9, "Llama 3.1 8B": 8.03e9, "Llama 3.1 70B": 70.6e9}
    sizes |= {"Llama 3.1 405B": 405.9e9, "Mistral 7B": 7.24e9, "MaxText 52B": 52e9}
    for row in ROWS:
        if row.model in sizes:
            assert row.shape.params == pytest.approx(sizes[row.model], rel=0.01)
