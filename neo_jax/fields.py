"""Fields of dataclasses that declare which values they take, and one check of them all.

An option is declared in one line: its name, its type, its default and its range. The comment above
it is its help on the command line.
"""

import dataclasses
import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeVar

from neo_jax.errors import NeoError, brief, checked

Function = TypeVar("Function", bound=Callable[..., Any])

_RULE = "neo_jax.fields"  # of a field's metadata: makes of its name and a value what it holds


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
    given = (
        ("at least", operator.ge, least),
        ("above", operator.gt, above),
        ("at most", operator.le, most),
        ("below", operator.lt, below),
    )
    bounds = [(name, compare, bound) for name, compare, bound in given if bound is not None]
    ranged = " and ".join(f"{name} {bound:g}" for name, _, bound in bounds)
    ranged = "0 or more" if ranged == "at least 0" else ranged
    words = words or f"be {ranged}, not {{}}" + (f"; {off:g} is off" if off is not None else "")

    def bounded(name: str, value: Any) -> Any:
        if all(compare(value, bound) for _, compare, bound in bounds):
            return value
        raise NeoError(f"{name} must {words.replace('{}', brief(value))}.")

    return converted(default, bounded)


def choice(default: Any, values: tuple[Any, ...]) -> Any:
    """Returns a field for one of several values."""
    *first, last = map(repr, values)

    def chosen(name: str, value: Any) -> Any:
        if value in values:
            return value
        raise NeoError(f"{name} must be {', '.join(first)} or {last}, not {brief(value)}.")

    return converted(default, chosen)


def converted(default: Any, convert: Callable[[str, Any], Any]) -> Any:
    """Returns a field whose value is what a function makes of it.

    Args:
      default: without one, `dataclasses.MISSING`, the field must be given.
      convert: takes the field's name and a value; raises NeoError where that cannot be one.
    """
    return dataclasses.field(default=default, metadata={_RULE: convert})


def check(options: Any, prefix: str = "") -> None:
    """Checks and converts all fields of a dataclass; numbers, a library's too, become Python's.

    Args:
      options: an instance, which may be frozen.
      prefix: of the names of fields in messages, such as "optimizer.".

    Raises:
      NeoError: a value is of another kind than its field's type, int, float or bool, or out of its
        range.
    """
    for field in dataclasses.fields(options):
        name, value = prefix + field.name, getattr(options, field.name)
        if field.type in (int, float):
            value = checked(name, value, field.type)
        if field.type is bool and not isinstance(value, bool):
            raise NeoError(f"{name} must be true or false, not {brief(value)}.")
        if _RULE in field.metadata:
            value = field.metadata[_RULE](name, value)
        object.__setattr__(options, field.name, value)


def takes(*kinds: type) -> Callable[[Function], Function]:
    """Gives a function with `**options` a signature that names the fields of dataclasses.

    Tab completion, `help` and documentation show them; the function itself stays as it is.
    """

    def with_signature(function: Function) -> Function:
        signature = inspect.signature(function)
        *named, options = signature.parameters.values()
        fields = [field for kind in kinds for field in dataclasses.fields(kind)]
        shown = [
            inspect.Parameter(
                field.name, options.KEYWORD_ONLY, default=field.default, annotation=field.type
            )
            for field in fields
            if field.name not in signature.parameters
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*named, *shown]
        )
        return function

    return with_signature
