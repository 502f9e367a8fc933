"""Of few long documents passages are held out, in the place of whole documents.

Every passage ends with a line, or with a word where lines are long. Those that are held out are
spread evenly over the text of a source. What lies between two of them is a document of its own.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence

from neo_jax.data.sources import Document, Run, Source
from neo_jax.data.text_file import TextFile, text_parts

LENGTH = 1000
"""Characters of a passage, at least; four times as many at most."""

_ENOUGH = 3  # documents that the smaller split is expected to have
_MOST = 1000  # documents that are looked at
_STEP = 0.618034  # from source to source, so that their first passages are not held out together


def are_few(sources: Sequence[Source], share: float) -> bool:
    """Returns whether documents are too few to hold out a share of them, and long enough to cut."""
    smaller = min(share, 1 - share)
    if not smaller:
        return False
    most = min(_MOST, int(_ENOUGH / smaller))
    documents = itertools.chain.from_iterable(source.documents() for source in sources)
    count, is_any_long = 0, False
    for document in itertools.islice(documents, most):
        if not isinstance(document, str | TextFile):
            return False
        count += 1
        is_any_long = is_any_long or len(next(text_parts(document), "")) > LENGTH
    return is_any_long and count * smaller < _ENOUGH


def by_passages(sources: Sequence[Source], share: float) -> list[Source]:
    """Returns sources whose documents are runs of passages, of which a share is held out."""
    return [
        dataclasses.replace(
            source, documents=functools.partial(_runs, source, share, (0.5 + i * _STEP) % 1)
        )
        for i, source in enumerate(sources)
    ]


def _runs(source: Source, share: float, phase: float) -> Iterator[Document]:
    """Yields the documents of a source in runs; `phase` is the part of a period behind it."""
    numbers = itertools.count()
    for document in source.documents():
        if not isinstance(document, str | TextFile):  # which those that follow must not be
            yield document
            continue
        marked = ((_is_due(next(numbers), share, phase), text) for text in _passages(document))
        for is_held_out, run in itertools.groupby(marked, key=lambda pair: pair[0]):
            yield Run("".join(text for _, text in run), is_held_out)


def _is_due(number: int, share: float, phase: float) -> bool:
    """Returns whether a passage is held out: in each period of 1 / share passages one is."""
    return int((number + 1) * share + phase) > int(number * share + phase)


def _passages(document: str | TextFile) -> Iterator[str]:
    text = ""
    for part in itertools.chain(text_parts(document), [""]):
        text += part
        while len(text) >= 4 * LENGTH or (text and not part):
            place = _end(text)
            yield text[:place]
            text = text[place:]


def _end(text: str) -> int:
    """Returns where the first passage of a text ends."""
    most = 4 * LENGTH
    line, word = text.find("\n", LENGTH, most), text.find(" ", LENGTH, most)
    return line + 1 or (word if word > 0 else most)
