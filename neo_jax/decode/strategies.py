"""Beam search and drafts for many prompts: what may stand in the place of `batching.complete`."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from neo_jax.axes import Params
from neo_jax.decode import beam, speculative
from neo_jax.decode.beam import BeamOptions
from neo_jax.decode.engine import Completion
from neo_jax.decode.sampling import stack_settings
from neo_jax.decode.scheduler import Request, check
from neo_jax.decode.speculative import Draft
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo

T = TypeVar("T")


class Found(NamedTuple):
    """A completion, and what its method knows beside."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    score: float | None = None  # of beam search
    drafted: int | None = None  # tokens of drafts that were judged
    accepted: int | None = None  # and those of them that are in the text


Method = Callable[
    [Neo, Params, Sequence[Request], int], Iterator[tuple[int, Sequence[Completion | Found]]]
]
"""Yields the index of each request and its completions; see `batching.complete`."""


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """Finds as many texts for a request as it has options, best first; these draw nothing."""

    options: BeamOptions

    def __call__(
        self, model: Neo, params: Params, requests: Sequence[Request], rows: int
    ) -> Iterator[tuple[int, list[Found]]]:
        """See `Method`.

        Raises:
          NeoError: see `beam.search`; or the penalties left fewer texts than are asked for.
        """
        num_beams = self.options.num_beams
        rows = max(rows // num_beams, 1)
        check(model, requests, min(rows, len(requests)) * num_beams)
        for batch in _batches(range(len(requests)), rows):
            asked = [requests[i] for i in batch]
            searches = beam.search(
                model,
                params,
                [request.ids for request in asked],
                max(request.max_new_tokens for request in asked),
                self.options,
                stack_settings(
                    [dataclasses.replace(request.options[0], temperature=0.0) for request in asked]
                ),
                max(len(request.options) for request in asked),
            )
            for index, request, found in zip(batch, asked, searches, strict=True):
                beams = found[: len(request.options)]
                if len(beams) < len(request.options):
                    raise NeoError(
                        f"only {len(beams)} texts are left by no_repeat_ngram_size; ask for fewer."
                    )
                yield index, [_stopped(Found(*one), request, i) for i, one in enumerate(beams)]


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Writes texts with the help of a draft."""

    draft: Draft | None  # None looks up what followed before in the text
    num_drafted: int

    def __call__(
        self, model: Neo, params: Params, requests: Sequence[Request], rows: int
    ) -> Iterator[tuple[int, list[Found]]]:
        """See `Method`.

        Raises:
          NeoError: see `speculative.generate`.
        """
        texts = [(i, j) for i, request in enumerate(requests) for j in range(len(request.options))]
        check(model, requests, min(rows, len(texts)))
        speculative.check_draft(model, self.draft, self.num_drafted)
        if self.draft:
            check(self.draft.model, requests, min(rows, len(texts)))
        held: list[Found] = []
        for batch in _batches(texts, rows):
            completions, fared = speculative.generate(
                model,
                params,
                self.draft,
                [requests[i].ids for i, _ in batch],
                max(requests[i].max_new_tokens for i, _ in batch),
                stack_settings([requests[i].options[j] for i, j in batch]),
                self.num_drafted,
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
    """Cuts a whole text where its watch stops it."""
    keep = request.watches[sample](found.ids) if request.watches else None
    if keep is None:
        return found
    ids, logprobs = found.ids[:keep], found.logprobs[:keep]
    return found._replace(ids=ids, logprobs=logprobs, finish_reason="stop")
