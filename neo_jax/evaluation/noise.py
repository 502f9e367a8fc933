"""Noise in texts: typing errors, look-alikes, case and spaces, at a stated rate, by a seed.

What happens to a text depends on the seed, the kind of noise and the text alone, so a text has the
same noise wherever it occurs. Each place draws a number, and changes where that is below the rate:
the places that change at a rate change at all higher ones.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from neo_jax.errors import NeoError, checked
from neo_jax.fields import check, converted, number

Noise = Literal["typos", "homoglyphs", "case", "spaces"]


def _rates(name: str, value: Any) -> tuple[float, ...]:
    rates = tuple(checked(name, rate, float) for rate in value)
    if not rates or not all(0 <= rate <= 1 for rate in rates):
        raise NeoError(f"{name} must be shares from 0 to 1, as in 0 0.1 0.2.")
    return tuple(sorted(set(rates)))


@dataclasses.dataclass(frozen=True)
class NoiseOptions:
    """Noise that is put into texts, and how much of it."""

    # typos, homoglyphs, case or spaces, one after another: texts of --text, contexts of --tasks
    perturb: tuple[Noise, ...] = ()
    # of letters, or of spaces and words, that are changed; 0 is the text as it is
    rates: tuple[float, ...] = converted((0.0, 0.05, 0.1, 0.2, 0.4), _rates)
    noise_seed: int = number(0, least=0)  # of the places that are changed, and how

    def __post_init__(self) -> None:
        check(self)


def perturb(text: str, noise: Noise, rate: float, seed: int = 0) -> str:
    """Returns a text with noise.

    Args:
      text: any.
      noise: "typos": of the letters a to z at the rate, equally often, one changes places with the
        next letter, is left out, is doubled, or becomes a neighbour on a US keyboard.
        "homoglyphs": of the letters that have one, each at the rate becomes its Cyrillic
        look-alike (Unicode Technical Standard 39, confusables). "case": letters change between
        upper and lower. "spaces": spaces at the rate are left out, and words of two
        characters or more at the rate get one inside.
      rate: from 0, nothing, to 1.
      seed: of the draws.
    """
    if rate <= 0 or not text:
        return text
    key = hashlib.blake2b(f"{seed} {noise} {text}".encode(errors="surrogatepass"), digest_size=8)
    rng = np.random.default_rng(int.from_bytes(key.digest()))
    # For each character when it is changed, and how.
    when, how = rng.random((2, len(text)))
    return _NOISES[noise](text, when < rate, how)


_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _neighbours() -> dict[str, str]:
    """Returns the letters next to each on a US keyboard, whose rows stand half a key apart."""
    places = {
        letter: (x + 0.5 * y, y) for y, row in enumerate(_ROWS) for x, letter in enumerate(row)
    }
    return {
        letter: "".join(
            other
            for other, (u, v) in places.items()
            if other != letter and abs(u - x) <= 1 and abs(v - y) <= 1
        )
        for letter, (x, y) in places.items()
    }


_NEIGHBOURS = _neighbours()
_LOOK_ALIKES = dict(zip("aceijopsxyABCEHIJKMOPSTX", "асеіјорѕхуАВСЕНІЈКМОРЅТХ", strict=True))


def _typos(text: str, changes: np.ndarray, how: np.ndarray) -> str:
    chars = list(text)
    for i in np.flatnonzero(changes).tolist():
        letter = text[i]
        near = _NEIGHBOURS.get(letter.lower())
        if not near:
            continue
        kind, share = divmod(how[i] * 4, 1)
        after = text[i + 1 : i + 2]
        is_free = i + 1 < len(text) and not changes[i + 1] and not (i and changes[i - 1])
        if kind == 0 and after.lower() in _NEIGHBOURS and is_free:
            chars[i], chars[i + 1] = after, letter
        elif kind == 1:
            chars[i] = ""
        elif kind == 2:
            chars[i] = letter * 2
        else:  # also where the next one is no letter to change places with
            other = near[int(share * len(near))]
            chars[i] = other.upper() if letter.isupper() else other
    return "".join(chars)


def _homoglyphs(text: str, changes: np.ndarray, how: np.ndarray) -> str:
    pairs = zip(text, changes, strict=True)
    return "".join(_LOOK_ALIKES.get(char, char) if changed else char for char, changed in pairs)


def _case(text: str, changes: np.ndarray, how: np.ndarray) -> str:
    pairs = zip(text, changes, strict=True)
    return "".join(char.swapcase() if changed else char for char, changed in pairs)


def _spaces(text: str, changes: np.ndarray, how: np.ndarray) -> str:
    chars = list(text)
    start = 0
    for i, char in enumerate([*text, "\n"]):
        if not char.isspace():
            continue
        size = i - start
        if size > 1 and changes[start]:
            chars[start + int(how[start] * (size - 1))] += " "
        if char == " " and i < len(text) and changes[i]:
            chars[i] = ""
        start = i + 1
    return "".join(chars)


_NOISES: dict[Noise, Callable[[str, np.ndarray, np.ndarray], str]] = {
    "typos": _typos,
    "homoglyphs": _homoglyphs,
    "case": _case,
    "spaces": _spaces,
}
