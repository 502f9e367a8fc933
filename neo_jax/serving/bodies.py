"""From the JSON of a request to a dataclass: types, ranges, and no field dropped in silence.

A field is declared in one line with the rule of its values. `null` is the same as no field.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

from neo_jax.errors import NeoError, brief, checked, reason, suggest
from neo_jax.serving.errors import ApiError, invalid

Rule = Callable[[str, Any], Any]
"""Makes of a field's name and a value what the field holds; raises NeoError or ApiError."""


class Lacking(NamedTuple):
    """A field that asks for what this server does not do."""

    why: str
    neutral: Collection[Any] = ()  # values that ask for nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
    """What a request may hold, next to the fields of the dataclass."""

    ignored: ClassVar[frozenset[str]] = frozenset()  # fields that change no answer
    lacking: ClassVar[Mapping[str, Lacking]] = {}


T = TypeVar("T", bound=Body)


def given(rule: Rule, default: Any = None) -> Any:
    """Returns a field of a body; `dataclasses.MISSING` as its default says that it is needed."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def parse_body(text: bytes) -> Any:
    """Returns the value that a body holds.

    Raises:
      ApiError: it is no JSON in UTF-8, nested too deep, names a field twice, or holds NaN.
    """
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant
        )
    except RecursionError:
        why = "nested too deep"
    except ValueError as error:
        why = reason(error)
    raise ApiError(400, f"the body is not valid JSON ({why}).", code="invalid_json")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"{brief(twice)} is named twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def read(kind: type[T], body: Any) -> T:
    """Reads a body.

    Raises:
      ApiError: it is no object, a field is unknown, missing, of another type or out of its range,
        or asks for what this server does not do; the message names the field.
    """
    return kind(**read_fields(kind, body, "the body"))


def read_fields(kind: type[Body], body: Any, what: str, prefix: str = "") -> dict[str, Any]:
    """Returns the fields of a body, or of an object in it, whose names begin with a prefix."""
    if not isinstance(body, dict):
        raise invalid(
            f"{what} must be a JSON object, not {brief(body)}.", prefix.strip(".") or None
        )
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for name, value in body.items():
        label = prefix + name
        if value is None or name in kind.ignored:
            _check_known(name, label, kind, fields)
        elif name in kind.lacking:
            why, neutral = kind.lacking[name]
            if value not in neutral:
                raise invalid(
                    f"{label} {brief(value)} is not supported: {why}.", label, "unsupported_value"
                )
        else:
            _check_known(name, label, kind, fields)
            values[name] = convert(fields[name].metadata["rule"], label, value)
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise invalid(
                f"{prefix}{name} is missing; {what} must have it.",
                prefix + name,
                "missing_required_parameter",
            )
    return values


def _check_known(name: str, label: str, kind: type[Body], fields: Collection[str]) -> None:
    if name not in fields and name not in kind.ignored and name not in kind.lacking:
        known = suggest(name, fields)
        raise invalid(f"unknown field {brief(label)}.{known}", label, "unknown_parameter")


def convert(rule: Rule, name: str, value: Any) -> Any:
    """Returns what a rule makes of a value; its errors have the name of the field."""
    try:
        return rule(name, value)
    except NeoError as error:
        raise invalid(str(error), name) from error


def whole(least: int, most: int) -> Rule:
    """Returns the rule of a whole number in a range."""

    def rule(name: str, value: Any) -> int:
        if least <= checked(name, value, int) <= most:
            return value
        raise NeoError(f"{name} must lie between {least} and {most}, not be {brief(value)}.")

    return rule


def real(name: str, value: Any) -> float:
    """Is the rule of a finite number."""
    number = checked(name, value, float)
    if not math.isfinite(number):
        raise NeoError(f"{name} must be a finite number, not {brief(value)}.")
    return number


def flag(name: str, value: Any) -> bool:
    """Is the rule of true and false."""
    if isinstance(value, bool):
        return value
    raise NeoError(f"{name} must be true or false, not {brief(value)}.")


def text(name: str, value: Any) -> str:
    """Is the rule of a text."""
    if isinstance(value, str):
        return value
    raise NeoError(f"{name} must be a text, not {brief(value)}.")


def listed(name: str, value: Any, most: int) -> list[Any]:
    """Returns a list of at most so many entries."""
    if not isinstance(value, list):
        raise NeoError(f"{name} must be a list, not {brief(value)}.")
    if len(value) > most:
        raise NeoError(f"{name} must have at most {most} entries, not {len(value)}.")
    return value


def ids(most: int) -> Rule:
    """Returns the rule of a list of token ids."""

    def rule(name: str, value: Any) -> tuple[int, ...]:
        for place, token in enumerate(listed(name, value, most)):
            if type(token) is not int or not 0 <= token < 2**31:
                raise NeoError(f"{name}[{place}] must be a token id, not {brief(token)}.")
        return tuple(value)

    return rule


def prompts(name: str, value: Any) -> tuple[str | list[int], ...]:
    """Is the rule of what is read: a text, a list of texts, ids, or a list of lists of ids."""
    if isinstance(value, str):
        return (value,)
    many = listed(name, value, MOST_TOKENS)
    if not many:
        raise NeoError(f"{name} is an empty list; give a text, token ids, or a list of them.")
    one = ids(MOST_TOKENS)
    if all(type(entry) is int for entry in many):
        return ([*one(name, many)],)
    listed(name, many, MOST_PROMPTS)
    if all(isinstance(entry, str) for entry in many):
        return tuple(many)
    if all(isinstance(entry, list) for entry in many):
        return tuple([*one(f"{name}[{place}]", entry)] for place, entry in enumerate(many))
    raise NeoError(
        f"{name} must be a text, a list of texts, a list of token ids, or a list of such lists, "
        f"not {brief(value)}."
    )


MOST_PROMPTS = 2048
"""Prompts of a request, and texts that it may ask for."""
MOST_TOKENS = 1_000_000
