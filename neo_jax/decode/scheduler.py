"""Many prompts by a batch of fixed size: a row whose text is done takes the next prompt at once.

Prompts are taken in order of length, within a window of them, so that texts of like length stand
together: little is padded, and the cache's room, which grows and shrinks by powers of two, is that
of the longest text in the batch. A prompt is read once, however many samples of it are drawn.

Programs are few, whatever the prompts. With b powers of two from 16 to the context (as lengths of
prompts) and r from 64 to the context (as room), and the same number of rows, at most
b for reading prompts, b for an empty batch of the first one's room, b r to put them into it, r to
write, and (b - 1) r to change the room.

A text depends on its prompt, its options and its seed: not on the rows beside it or its turn.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.engine import Completion, DecodeState, bucket
from neo_jax.decode.sampling import SamplingOptions, size_of_bans, stack_settings
from neo_jax.devices.processes import to_host
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import padded_rows

WINDOW = 16  # prompts for each row that are brought in order of length
PREFILL_TOKENS = 512  # of prompts that are read together, padding included
WATCHED_STEPS = 8  # between two looks at texts that may have to stop

T = TypeVar("T")

Watch = Callable[[list[int]], int | None]
"""Takes the new ids of a text since the last call; says how many of all to keep, to stop it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, once for each of several options."""

    ids: Sequence[int]
    max_new_tokens: int
    options: Sequence[SamplingOptions]
    watches: Sequence[Watch] = ()  # one for each of the options, or none


def complete(
    model: Neo, params: Params, requests: Sequence[Request], rows: int
) -> Iterator[tuple[int, list[Completion]]]:
    """Yields the index of a request and its completions, as requests are done.

    Args:
      model: the model.
      params: its parameters.
      requests: prompts.
      rows: texts that are written at one time, at most.

    Raises:
      NeoError: see `check`; before anything runs.
    """
    rows = min(rows, sum(len(request.options) for request in requests))
    check(model, requests, rows)
    return _Batch(model, params, requests, padded_rows(model.sharding, rows)).run()


def check(model: Neo, requests: Sequence[Request], rows: int) -> None:
    """Checks that each request can be continued, and so many of their texts at one time.

    Raises:
      NeoError: see `engine.check_prompts` and `engine.check_rows`.
    """
    for request in requests:
        engine.check_prompts(model, [request.ids], request.max_new_tokens)
    longest = max((len(request.ids) + request.max_new_tokens for request in requests), default=1)
    engine.check_rows(model, rows, longest)


def in_order(finished: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Yields what comes with the indices 0, 1, 2, ... in their order."""
    held: dict[int, T] = {}
    turn = 0
    for index, completions in finished:
        held[index] = completions
        while turn in held:
            yield held.pop(turn)
            turn += 1


@dataclasses.dataclass
class _Text:
    """A text in the making."""

    request: int
    sample: int
    source: int  # its prompt's row among those that were read together
    watch: Watch | None
    seen: int = 0  # new ids that the watch has been given


class _Batch:
    """The batch, and what waits for a place in it."""

    def __init__(self, model: Neo, params: Params, requests: Sequence[Request], rows: int):
        self._model = model
        self._params = params
        self._requests = requests
        self._bans = size_of_bans(each for request in requests for each in request.options)
        self._texts: list[_Text | None] = [None] * rows
        self._state: DecodeState | None = None
        self._queue = deque(_turns(requests, WINDOW * max(rows, 1)))
        self._read: DecodeState | None = None  # prompts that were read, for `_waiting`
        self._waiting: deque[_Text] = deque()
        self._done: dict[int, dict[int, Completion]] = {}

    def run(self) -> Iterator[tuple[int, list[Completion]]]:
        """See `complete`."""
        self._fill()
        while any(self._texts):
            texts = [text for text in self._texts if text]
            steps = max(self._requests[text.request].max_new_tokens for text in texts)
            if any(text.watch for text in texts):
                steps = min(steps, WATCHED_STEPS)
            enough = len(self._texts) - len(texts) + 1
            self._state = engine.run(self._model, self._params, self._state, steps, enough)
            yield from self._harvest()
            self._fill()

    def _fill(self) -> None:
        """Gives rows that are free to texts that wait."""
        free = [row for row, text in enumerate(self._texts) if text is None]
        while free and (self._waiting or self._queue):
            if not self._waiting:
                self._read_prompts()
            count = min(len(free), len(self._waiting))
            taken, free = free[:count], free[count:]
            for row in taken:
                self._texts[row] = self._waiting.popleft()
            self._insert(taken)

    def _read_prompts(self) -> None:
        """Reads the next prompts of one bucket."""
        model, requests = self._model, self._requests
        width = self._width(self._queue[0])
        rows = padded_rows(model.sharding, _rows_to_read(width, len(self._texts)))
        tokens = np.zeros((rows, width), np.int32)
        lengths, limits = np.ones((2, rows), np.int32)
        for row in range(rows):
            if not self._queue or self._width(self._queue[0]) != width:
                break
            index = self._queue.popleft()
            request = requests[index]
            lengths[row] = len(request.ids)
            limits[row] = lengths[row] + request.max_new_tokens
            tokens[row, : lengths[row]] = request.ids
            for sample in range(len(request.options)):
                watch = request.watches[sample] if request.watches else None
                self._waiting.append(_Text(index, sample, row, watch))
        settings = stack_settings([SamplingOptions()] * rows, self._bans)
        self._read = engine.prefill(model, width, self._params, tokens, lengths, limits, settings)

    def _width(self, index: int) -> int:
        length = len(self._requests[index].ids)
        return bucket(length, engine.MIN_PREFILL, self._model.config.max_length)

    def _insert(self, rows: list[int]) -> None:
        model, texts = self._model, [text for text in self._texts if text]
        assert self._read is not None
        longest = max(
            len(request.ids) + request.max_new_tokens
            for request in (self._requests[text.request] for text in texts)
        )
        room = bucket(longest, engine.MIN_ROOM, model.config.max_length)
        if self._state is None:
            self._state = engine.blank(model, len(self._texts), self._read)
        if self._state.tokens.shape[1] != room:
            self._state = engine.resize(model, room, self._state)
        new = [text for text in (self._texts[row] for row in rows) if text]
        options = [self._requests[text.request].options[text.sample] for text in new]
        fill = len(self._texts) - len(rows)
        self._state = engine.insert(
            model,
            self._state,
            self._read,
            np.array([text.source for text in new] + [0] * fill, np.int32),
            np.array(rows + [0] * fill, np.int32),
            len(rows),
            stack_settings(options + [SamplingOptions()] * fill, self._bans),
        )

    def _harvest(self) -> Iterator[tuple[int, list[Completion]]]:
        """Takes texts that are done out of the batch; yields requests whose texts all are."""
        state = self._state
        assert state is not None
        done, lengths = to_host(state.done), to_host(state.lengths)
        watched = any(text.watch for text in self._texts if text)
        ended = [row for row, text in enumerate(self._texts) if text and done[row]]
        if not ended and not watched:
            return
        tokens, logprobs = to_host(state.tokens), to_host(state.logprobs)
        halted = np.zeros(len(done), bool)
        for row, text in enumerate(self._texts):
            if text is None:
                continue
            request = self._requests[text.request]
            made = engine.completion(
                tokens[row],
                logprobs[row],
                int(lengths[row]),
                len(request.ids),
                self._model.config.eos_ids,
            )
            keep = None
            if text.watch:
                keep = text.watch(made.ids[text.seen :])
                text.seen = len(made.ids)
            if keep is not None:
                halted[row] = not done[row]
                made = Completion(made.ids[:keep], made.logprobs[:keep], "stop")
            elif not done[row]:
                continue
            self._texts[row] = None
            samples = self._done.setdefault(text.request, {})
            samples[text.sample] = made
            if len(samples) == len(request.options):
                del self._done[text.request]
                yield text.request, [samples[i] for i in range(len(samples))]
        if halted.any():
            self._state = engine.halt(self._model, state, halted)


def _turns(requests: Sequence[Request], window: int) -> Iterator[int]:
    """Yields requests window by window, in each by length: the first do not wait for the last."""
    for first in range(0, len(requests), window):
        some = range(first, min(first + window, len(requests)))
        yield from sorted(some, key=lambda i: len(requests[i].ids))


def _rows_to_read(width: int, rows: int) -> int:
    """Prompts that are read together: one number for a width, so that each has one program."""
    return max(min(PREFILL_TOKENS // width, rows), 1)
