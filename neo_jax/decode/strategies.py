"""Beam search and drafts for many prompts: what may take the place of `scheduler.complete`.

They take requests batch by batch, in order, and cut texts that are to stop when they are whole.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from neo_jax.axes import Params
from neo_jax.decode import beam, speculative
from neo_jax.decode.engine import Completion
from neo_jax.decode.options import BeamOptions, stack_settings
from neo_jax.decode.requests import Request
from neo_jax.decode.scheduler import check
from neo_jax.decode.speculative import Draft
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo

T = TypeVar("T")


class Found(NamedTuple):
    """A completion, and what else its strategy knows of it."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    score: float | None = None  # of beam search
    drafted: int | None = None  # tokens of drafts that were judged
    accepted: int | None = None  # and those of them that are in the text


Strategy = Callable[
    [Neo, Params, Sequence[Request], int], Iterator[tuple[int, Sequence[Completion | Found]]]
]
"""Yields the index of each request and its completions; see `scheduler.complete`."""


def search_beams(
    options: BeamOptions, model: Neo, params: Params, requests: Sequence[Request], rows: int
) -> Iterator[tuple[int, list[Found]]]:
    """Finds as many texts for a request as it has options, best first; these draw nothing.

    Raises:
      NeoError: see `beam.search`; or the penalties left fewer texts than are requested.
    """
    rows = max(rows // options.num_beams, 1)
    check(model, requests, min(rows, len(requests)) * options.num_beams)
    for indices in _batches(range(len(requests)), rows):
        batch = [requests[i] for i in indices]
        greedy = [dataclasses.replace(each.options[0], temperature=0.0) for each in batch]
        searches = beam.search(
            model,
            params,
            [request.ids for request in batch],
            max(request.max_new_tokens for request in batch),
            options,
            stack_settings(greedy),
            max(len(request.options) for request in batch),
        )
        for index, request, found in zip(indices, batch, searches, strict=True):
            beams = found[: len(request.options)]
            if len(beams) < len(request.options):
                raise NeoError(
                    f"only {len(beams)} texts are left by no_repeat_ngram_size; ask for fewer."
                )
            yield index, [_stopped(Found(*one), request, i) for i, one in enumerate(beams)]


def speculate(
    draft: Draft | None,
    num_drafted: int,
    model: Neo,
    params: Params,
    requests: Sequence[Request],
    rows: int,
) -> Iterator[tuple[int, list[Found]]]:
    """Writes texts with the help of a draft; see `speculative.generate`, also for errors."""
    texts = [(i, j) for i, request in enumerate(requests) for j in range(len(request.options))]
    speculative.check_draft(model, draft, num_drafted)
    for each in (model, draft.model) if draft else (model,):
        check(each, requests, min(rows, len(texts)))
    held: list[Found] = []
    for batch in _batches(texts, rows):
        completions, fared = speculative.generate(
            model,
            params,
            draft,
            [requests[i].ids for i, _ in batch],
            max(requests[i].max_new_tokens for i, _ in batch),
            stack_settings([requests[i].options[j] for i, j in batch]),
            num_drafted,
        )
        for (i, j), one, counts in zip(batch, completions, fared, strict=True):
            found = Found(*one, drafted=counts.judged, accepted=counts.accepted)
            held.append(_stopped(found, requests[i], j))
            if len(held) == len(requests[i].options):
                yield i, held
                held = []


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[first : first + size] for first in range(0, len(items), size))


def _stopped(found: Found, request: Request, sample: int) -> Found:
    """Cuts a whole text where its check stops it."""
    keep = request.stop_checks[sample](found.ids) if request.stop_checks else None
    if keep is None:
        return found
    ids, logprobs = found.ids[:keep], found.logprobs[:keep]
    return found._replace(ids=ids, logprobs=logprobs, finish_reason="stop")
