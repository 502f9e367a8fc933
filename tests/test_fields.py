"""fields.py: what a dataclass declares of its fields is what they take."""

import dataclasses
import math

import numpy as np
import pytest

from neo_jax.errors import NeoError
from neo_jax.fields import check, choice, number


@dataclasses.dataclass(frozen=True)
class Options:
    steps: int = number(least=1)
    top: int = number(3, least=0)
    share: float = number(0.5, above=0, most=1, off=1)
    decay: float = number(0.9, least=0, below=1)
    heat: float = number(1.0, least=0, most=9, words="lie between 0 and 9, not be {}")
    bare: float = 2.0
    kind: str = choice("a", ("a", "b", False))
    name: str = ""

    def __post_init__(self):
        check(self, "some.")


def test_values_in_their_ranges_are_taken():
    options = Options(steps=1, top=0, share=1, decay=0.0, heat=9.0, kind=False)
    assert options == Options(1, np.int64(0), np.float32(1), 0, np.float64(9), 2, False)
    kinds = [type(getattr(options, field.name)) for field in dataclasses.fields(options)]
    assert kinds == [int, int, float, float, float, float, bool, str]
    assert Options(2).top == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "some.steps must be at least 1, not 0."),
        ({"steps": 1.5}, "some.steps must be a whole number, not 1.5."),
        ({"steps": True}, "some.steps must be a whole number, not True."),
        ({"top": -1}, "some.top must be 0 or more, not -1."),
        ({"share": 0}, "some.share must be above 0 and at most 1, not 0.0; 1 is off."),
        ({"share": 1.1}, "some.share must be above 0 and at most 1, not 1.1; 1 is off."),
        ({"share": math.nan}, "some.share must be above 0 and at most 1, not nan; 1 is off."),
        ({"decay": 1}, "some.decay must be at least 0 and below 1, not 1.0."),
        ({"decay": -1e-9}, "some.decay must be at least 0 and below 1, not -1e-09."),
        ({"heat": math.inf}, "some.heat must lie between 0 and 9, not be inf."),
        ({"bare": "x"}, "some.bare must be a number, not 'x'."),
        ({"kind": "c"}, "some.kind must be 'a', 'b' or False, not 'c'."),
    ],
)
def test_other_values_are_refused(values, message):
    with pytest.raises(NeoError) as error:
        Options(**{"steps": 1, **values})
    assert str(error.value) == message


def test_a_field_without_a_default_must_be_given():
    with pytest.raises(TypeError, match="steps"):
        Options()
