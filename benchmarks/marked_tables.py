"""Writes results into a page of the documentation, between the marks of each."""

from collections.abc import Mapping
from pathlib import Path


def fill(page: Path, parts: Mapping[str, str]) -> None:
    """Puts each part in the place of what is between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    text = page.read_text()
    for mark, new in parts.items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{new}\n\n{end}{rest.partition(end)[2]}"
    page.write_text(text)
