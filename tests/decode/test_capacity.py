"""decode/capacity.py: sizes hold what they are for, little more, and are few."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_jax.decode.capacity import capacity, padded_length, round_up, scored_length

sizes = st.integers(1, 5000)


@given(
    size=sizes,
    steps=st.sampled_from([1, 2, 4]),
    unit=st.sampled_from([1, 16]),
    extra=st.integers(0, 5000),
)
def test_a_size_is_held_with_little_padding(size, steps, unit, extra):
    most = size + extra
    found = round_up(size, most, steps, unit)
    assert size <= found <= most
    padding = found - size
    assert padding * (steps + 1) < found or padding < unit
    assert found == most or found % unit == 0
    if steps == unit == 1:
        assert found == most or found & (found - 1) == 0
    assert round_up(found, most, steps, unit) == found
    assert found <= round_up(size + 1, most + 1, steps, unit)
    assert found == min(round_up(size, None, steps, unit), most)


@given(length=sizes, extra=st.integers(0, 5000))
def test_of_a_capacity_at_most_a_third_stays_empty(length, extra):
    context = length + extra
    slots = capacity(length, context)
    assert length <= slots <= context
    assert 2 * slots < 3 * length or slots == min(64, context) or slots == context
    assert capacity(slots, context) == slots
    prompt = min(length, slots)
    assert prompt <= padded_length(prompt, slots) <= slots  # it enters a batch of that capacity


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        (padded_length, [16, 32, 64, 128, 256, 512, 1024, 2048]),
        (capacity, [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]),
        (
            scored_length,
            [
                *range(16, 129, 16), *range(160, 257, 32), *range(320, 513, 64),
                *range(640, 1025, 128), *range(1280, 2049, 256),
            ],
        ),
    ],
)  # fmt: skip
def test_there_are_few_lengths(law, sizes):
    assert sorted({law(length, 2048) for length in range(1, 2049)}) == sizes
