"""The law that rounds lengths and counts up, so that few shapes, and so few programs, ever exist.

Between a power of two and the next there are one, two or four sizes, evenly spaced: the more of
them, the more programs, and the less padding. Lengths are multiples of 16 tokens too.
"""

import itertools

LENGTH_UNIT = 16
"""Lengths are multiples of so many tokens."""

_MIN_CAPACITY = 64


def round_up(size: int, most: int | None = None, steps: int = 1, unit: int = 1) -> int:
    """Returns the least size of the law that holds another.

    Args:
      size: at least 1.
      most: what is returned at most, no less than `size`; None for no bound.
      steps: sizes from a power of two to the next, so that less than 1 / (steps + 1) is padding.
      unit: what sizes are multiples of, up to `most`.
    """
    step = max((1 << (size - 1).bit_length()) // (2 * steps), unit)
    rounded = -(-size // step) * step
    return rounded if most is None else min(rounded, most)


def padded_length(longest: int, most: int) -> int:
    """Returns the length to which prompts are padded: 16, 32, 64, 128, ... tokens.

    Prompts are read once, each length by a program of its own.
    """
    return round_up(longest, most, unit=LENGTH_UNIT)


def capacity(length: int, context: int) -> int:
    """Returns the slots for texts of up to a length: 64, 96, 128, 192, ... tokens.

    Every step reads all of them, so that two sizes for each power of two are worth their programs.
    """
    return round_up(max(length, _MIN_CAPACITY), context, steps=2, unit=LENGTH_UNIT)


def coarse_capacity(length: int, context: int) -> int:
    """Returns the slots for texts of up to a length: 64, 128, 256, ... tokens.

    For a server, whose clients wait for each program that is new.
    """
    return round_up(max(length, _MIN_CAPACITY), context, unit=LENGTH_UNIT)


def row_sizes(most: int) -> list[int]:
    """Returns the numbers of rows that a server's batch may have: 1, 4, 16, ..., and the most.

    None is above half of the most: where the number changes, both batches are there for a moment.
    """
    sizes = itertools.takewhile(lambda size: 2 * size <= most, (4**i for i in itertools.count()))
    return [*sizes, most]


def scored_length(longest: int, context: int) -> int:
    """Returns the length to which texts to score are padded: 16, 32, 48, ..., 128, 160, ... tokens.

    All of a batch's work is in proportion to it, and programs are small: four for each power of
    two.
    """
    return round_up(longest, context, steps=4, unit=LENGTH_UNIT)
