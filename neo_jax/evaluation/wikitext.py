"""WikiText's raw files: their pages, and their text as people write it.

The files keep a space on each side of every mark. lm-evaluation-harness takes most of them back
before a model reads, and divides by the words and bytes of the page as it was; this does the same,
so that perplexities can be compared.
"""

import re
from collections.abc import Iterator

# Literal replacements and patterns, in the order in which the harness makes them.
_STEPS: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    (re.compile(r"/' [0-9]/"), "/'[0-9]/"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize(page: str) -> str:
    """Returns a page without the spaces that its tokenization put there."""
    for pattern, replacement in _STEPS:
        if isinstance(pattern, str):
            page = page.replace(pattern, replacement)
        else:
            page = pattern.sub(replacement, page)
    return page


def pages(text: str) -> Iterator[str]:
    """Yields the pages of a raw file, each with the line of its title: = Title = ."""
    page: list[str] = []
    for line in text.split("\n"):
        folded = line.replace("= = =", "===").replace("= =", "==").strip()
        if folded.startswith("= ") and folded.endswith(" ="):
            if any(map(str.strip, page)):
                yield "\n".join(page)
            page = []
        page.append(line)
    if any(map(str.strip, page)):
        yield "\n".join(page)
