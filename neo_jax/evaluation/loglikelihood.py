"""How likely given continuations of given contexts are, many at a time.

What a model reads for one request is often the beginning of what it reads for another: the choices
of a question have their context in common, and choices of one token all that is read. A row is
computed once for all requests that lie along it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from neo_jax.axes import Params
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import text_context
from neo_jax.model.transformer import Neo
from neo_jax.text.score import Question, score_rows


class Continuation(NamedTuple):
    """How likely is this continuation of that context?"""

    context: list[int]  # at least one token
    continuation: list[int]  # at least one token, at most as many as the context


class Likelihood(NamedTuple):
    """Of a `Continuation`."""

    logprob: float  # the sum over the continuation's tokens, in nats
    greedy: bool  # whether each of them is the likeliest


def score_continuations(
    model: Neo, params: Params, requests: Sequence[Continuation], batch_size: int = 0
) -> Iterator[tuple[int, Likelihood]]:
    """Yields the index of each request and its answer, as batches are finished.

    A context too long for the model loses its beginning. Of the batch size see `score_rows`.

    Raises:
      NeoError: a token that the model does not know.
    """
    vocab = model.config.vocab_size
    for number, each in enumerate(requests, 1):
        ids = (*each.context, *each.continuation)
        if min(ids) < 0 or max(ids) >= vocab:
            raise NeoError(
                f"request {number} has a token id outside the vocabulary, 0 to {vocab - 1}; does "
                "the tokenizer belong to the model?"
            )
    rows, members = _shared(requests, text_context(model))
    for i, (logprobs, greedy) in score_rows(model, params, rows, batch_size):
        first = 0
        for request in members[i]:
            here = slice(first, first + len(requests[request].continuation))
            first = here.stop
            total = float(logprobs[here].sum(dtype="float64"))
            yield request, Likelihood(total, bool(greedy[here].all()))


def _shared(
    requests: Sequence[Continuation], context: int
) -> tuple[list[Question], list[list[int]]]:
    """Returns the rows to compute, and the requests that each of them answers, in order."""
    read = [tuple((r.context + r.continuation)[-(context + 1) : -1]) for r in requests]
    rows: list[tuple[tuple[int, ...], list[int], list[int]]] = []
    members: list[list[int]] = []
    # In this order whatever another begins with comes behind it.
    for i in sorted(range(len(requests)), key=read.__getitem__, reverse=True):
        tokens, new = read[i], requests[i].continuation
        if not rows or rows[-1][0][: len(tokens)] != tokens:
            rows.append((tokens, [], []))
            members.append([])
        _, positions, targets = rows[-1]
        positions.extend(range(len(tokens) - len(new), len(tokens)))
        targets.extend(new)
        members[-1].append(i)
    return [Question(*row) for row in rows], members
