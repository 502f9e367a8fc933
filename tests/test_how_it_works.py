"""docs/how_it_works.md: what a value passes is there, and none of it is passed twice."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "how_it_works.md").read_text()
WAYS = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)+)", PAGE, re.MULTILINE))


def test_six_values_are_followed():
    assert len(WAYS) == 6


@pytest.mark.parametrize("value", WAYS)
def test_every_module_is_there_and_entered_once(value):
    modules = re.findall(r"^\d+\. `(neo_jax/[\w/.]+)`", WAYS[value], re.MULTILINE)
    assert len(modules) == len(re.findall(r"^\d+\.", WAYS[value], re.MULTILINE)) >= 6
    assert [module for module in modules if not (ROOT / module).exists()] == []
    assert len(set(modules)) == len(modules)
