"""Fields of dataclasses that declare which values they take, and one check of them all.

An option is declared in one line: its name, its type, its default and its range. The comment above
it is its help on the command line.
"""

import dataclasses
import operator
from typing import Any

from neo_jax.errors import NeoError, brief, checked

_RULE = "neo_jax.fields"  # of a field's metadata: what its value must do, in code and in words


def number(
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    off: float | None = None,
    words: str = "",
) -> Any:
    """Returns a field for a number in a range.

    Args:
      default: without one the field must be given.
      least: the smallest value.
      above: what values are larger than.
      most: the largest value.
      below: what values are smaller than.
      off: the value that turns the option off, which the message names.
      words: what a value must do, in place of what follows from the range, with "{}" for the value.
    """
    bounds = [
        ("at least", operator.ge, least),
        ("above", operator.gt, above),
        ("at most", operator.le, most),
        ("below", operator.lt, below),
    ]
    bounds = [bound for bound in bounds if bound[2] is not None]
    ranged = " and ".join(f"{name} {bound:g}" for name, _, bound in bounds)
    ranged = "0 or more" if ranged == "at least 0" else ranged
    words = words or f"be {ranged}, not {{}}" + (f"; {off:g} is off" if off is not None else "")
    return _field(
        default,
        lambda value: all(compare(value, bound) for _, compare, bound in bounds),
        lambda value: words.replace("{}", brief(value)),
    )


def choice(default: Any, values: tuple[Any, ...]) -> Any:
    """Returns a field for one of several values."""
    *first, last = map(repr, values)
    return _field(
        default,
        lambda value: value in values,
        lambda value: f"be {', '.join(first)} or {last}, not {brief(value)}",
    )


def _field(default: Any, allows: Any, words: Any) -> Any:
    return dataclasses.field(default=default, metadata={_RULE: (allows, words)})


def check(options: Any, prefix: str = "") -> None:
    """Checks all fields of a dataclass; makes numbers, a library's too, those of their type.

    Args:
      options: an instance, which may be frozen.
      prefix: of the names of fields in messages, such as "optimizer.".

    Raises:
      NeoError: a value is of another kind than its field's type, int or float, or out of its range.
    """
    for field in dataclasses.fields(options):
        name, value = prefix + field.name, getattr(options, field.name)
        if field.type in (int, float):
            value = checked(name, value, field.type)  # type: ignore[arg-type]
            object.__setattr__(options, field.name, value)
        if field.type is bool and not isinstance(value, bool):
            raise NeoError(f"{name} must be true or false, not {brief(value)}.")
        if _RULE in field.metadata:
            allows, words = field.metadata[_RULE]
            if not allows(value):
                raise NeoError(f"{name} must {words(value)}.")
