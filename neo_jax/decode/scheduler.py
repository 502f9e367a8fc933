"""Continuous batching: requests arrive and leave at any time, and share the rows of one batch.

A prompt is read once, however many samples of it are drawn, and enters the batch by
`engine.insert`; a row whose text is finished, or was cancelled, takes the next text in the next
step. The batch's capacity, which grows and shrinks, is that of its longest text. A text depends on
its prompt, its options and its seed: not on the other rows or its turn.

Programs are few, whatever the requests. With c capacities (`capacity.capacity`), b padded lengths
of prompts (these, 16 and 32) and the same number of rows, at most b to read prompts, b for an empty
batch of the first one's length, b c to insert them, c to write, c to stop rows, and b c to change
the capacity.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.capacity import capacity, padded_length
from neo_jax.decode.engine import Completion, DecodeState
from neo_jax.decode.options import SamplingOptions, size_of_bans, stack_settings
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import padded_rows

WINDOW = 16  # requests for each row that `complete` brings in order of length
PREFILL_TOKENS = 512  # of prompts that are read together, padding included
CHECKED_STEPS = 8  # between two looks at texts that may have to stop

T = TypeVar("T")

StopCheck = Callable[[list[int]], int | None]
"""Takes the new ids of a text since the last call; returns how many of all to keep, to stop it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, once for each of several options."""

    ids: Sequence[int]
    max_new_tokens: int
    options: Sequence[SamplingOptions]
    stop_checks: Sequence[StopCheck] = ()  # one for each of the options, or none
    stream: bool = False  # whether every step writes one token, and an event reports it


class Event(NamedTuple):
    """What a step did to a text.

    A text of a request that streams, or has stop checks, has one at each step; others have one,
    when they are finished.
    """

    request: int  # what `submit` returned
    sample: int  # the index of its options
    ids: list[int]  # new tokens since the text's last event
    logprobs: list[float]
    completion: Completion | None  # the whole text, once it is finished; a stop check may cut it


@dataclasses.dataclass
class _Text:
    """A sample that is being generated, or will be when its prompt has been read."""

    id: int  # of its request
    request: Request
    sample: int
    source: int  # its prompt's row among those that were read together
    reported: int = 0  # new ids that the stop check and events have had

    @property
    def is_watched(self) -> bool:
        return self.request.stream or bool(self.request.stop_checks)


class Scheduler:
    """Rows of one batch, and the requests that wait for them.

    All processes of a run must make the same calls.
    """

    def __init__(
        self, model: Neo, params: Params, rows: int, bans: tuple[int, int] = size_of_bans([])
    ):
        """Allocates nothing yet; `bans` is the room for what a request bans, see `size_of_bans`."""
        self._model, self._params, self._bans, self._max_rows = model, params, bans, rows
        self._rows: list[_Text | None] = [None] * padded_rows(model.sharding, rows)
        self._running = np.zeros(len(self._rows), bool)  # on the device, if it is not stopped
        self._state: DecodeState | None = None
        self._queue: deque[tuple[int, Request]] = deque()
        self._read: DecodeState | None = None  # prompts that were read, for `_waiting`
        self._waiting: deque[_Text] = deque()
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a text is not finished."""
        return bool(self._queue or self._waiting or any(self._rows))

    def submit(self, request: Request) -> int:
        """Queues a request; returns the id by which events name it.

        Raises:
          NeoError: see `check`; or it bans more than there is room for.
        """
        check(self._model, [request], self._max_rows)
        if any(a > b for a, b in zip(size_of_bans(request.options), self._bans, strict=True)):
            raise NeoError(
                f"more than {self._bans[0]} tokens or words, or a word of more than "
                f"{self._bans[1]} tokens, are suppressed; suppress fewer."
            )
        self._submitted += 1
        self._queue.append((self._submitted, request))
        return self._submitted

    def cancel(self, id: int) -> None:
        """Drops what is not finished of a request; the next step gives its rows to others."""
        self._queue = deque(entry for entry in self._queue if entry[0] != id)
        self._waiting = deque(text for text in self._waiting if text.id != id)
        self._rows = [None if text and text.id == id else text for text in self._rows]

    def step(self) -> list[Event]:
        """Fills free rows, then writes until a text is finished or is to be looked at.

        Returns:
          What became of texts; nothing where there are none.
        """
        self._fill()
        texts = [text for text in self._rows if text]
        if not texts:
            return []
        stopped = self._running & [text is None for text in self._rows]
        if stopped.any():
            self._state = engine.stop_rows(self._model, self._state, stopped)
        steps = max(text.request.max_new_tokens for text in texts)
        if any(text.is_watched for text in texts):
            steps = min(steps, CHECKED_STEPS)
        if any(text.request.stream for text in texts):
            steps = 1
        enough = len(self._rows) - len(texts) + 1
        self._state = engine.run(self._model, self._params, self._state, steps, enough)
        return list(self._events())

    def _fill(self) -> None:
        """Gives rows that are free to texts that wait."""
        free = [row for row, text in enumerate(self._rows) if text is None]
        while free and (self._waiting or self._queue):
            if not self._waiting:
                self._read_prompts()
            count = min(len(free), len(self._waiting))
            self._insert({row: self._waiting.popleft() for row in free[:count]})
            free = free[count:]

    def _read_prompts(self) -> None:
        """Reads the next prompts of one padded length."""
        model = self._model
        length = self._padded_length(self._queue[0])
        rows = padded_rows(model.sharding, _rows_to_read(length, len(self._rows)))
        prompts: list[tuple[Sequence[int], int]] = []
        while self._queue and len(prompts) < rows:
            if self._padded_length(self._queue[0]) != length:
                break
            id, request = self._queue.popleft()
            samples = range(len(request.options))
            self._waiting += [_Text(id, request, i, len(prompts)) for i in samples]
            prompts.append((request.ids, request.max_new_tokens))
        batch = engine.batched(prompts, rows, length)
        settings = stack_settings([SamplingOptions()] * rows, self._bans)
        self._read = engine.prefill(model, length, self._params, *batch, settings)

    def _padded_length(self, entry: tuple[int, Request]) -> int:
        ids, new = entry[1].ids, entry[1].max_new_tokens
        slots = capacity(len(ids) + new, self._model.config.max_length)
        return padded_length(len(ids), slots)  # never longer than the batch's capacity

    def _insert(self, new: dict[int, _Text]) -> None:
        """Puts texts whose prompts were read into rows."""
        model = self._model
        for row, text in new.items():
            self._rows[row], self._running[row] = text, True
        requests = [text.request for text in self._rows if text]
        longest = max(len(request.ids) + request.max_new_tokens for request in requests)
        slots = capacity(longest, model.config.max_length)
        assert self._read is not None
        if self._state is None:
            self._state = engine.empty_state(model, len(self._rows), self._read)
        if self._state.tokens.shape[1] != slots:
            self._state = engine.resize(model, slots, self._state)
        fill = [0] * (len(self._rows) - len(new))
        options = [text.request.options[text.sample] for text in new.values()]
        self._state = engine.insert(
            model,
            self._state,
            self._read,
            np.array([text.source for text in new.values()] + fill, np.int32),
            np.array([*new, *fill], np.int32),
            len(new),
            stack_settings(options + [SamplingOptions()] * len(fill), self._bans),
        )

    def _events(self) -> Iterator[Event]:
        """Takes texts that are finished out of the batch."""
        state = self._state
        assert state is not None
        done, *leaves = map(
            to_host,
            (state.done, state.tokens, state.logprobs, state.lengths, state.prompt_lengths),
        )
        self._running = ~done
        for row, text in enumerate(self._rows):
            if text is None or not (done[row] or text.is_watched):
                continue
            written = engine.completion(self._model, *(leaf[row] for leaf in leaves))
            new = slice(text.reported, None)
            ids, logprobs = written.ids[new], written.logprobs[new]
            text.reported = len(written.ids)
            checks = text.request.stop_checks
            keep = checks[text.sample](ids) if checks else None
            if keep is not None:
                written = Completion(written.ids[:keep], written.logprobs[:keep], "stop")
            finished = bool(done[row]) or keep is not None
            if finished:
                self._rows[row] = None
            yield Event(text.id, text.sample, ids, logprobs, written if finished else None)


def complete(
    model: Neo, params: Params, requests: Sequence[Request], rows: int
) -> Iterator[tuple[int, list[Completion]]]:
    """Yields the index of a request and its completions, as requests are done.

    Requests are taken in order of length, within a window of them, so that texts of like length
    are generated together, at most `rows` at one time: little is padded.

    Raises:
      NeoError: see `check`; before anything runs.
    """
    rows = min(rows, sum(len(request.options) for request in requests))
    bans = size_of_bans(each for request in requests for each in request.options)
    scheduler = Scheduler(model, params, rows, bans)
    indices = {scheduler.submit(requests[i]): i for i in _turns(requests, WINDOW * max(rows, 1))}

    def completions() -> Iterator[tuple[int, list[Completion]]]:
        done: dict[int, dict[int, Completion]] = {}
        while scheduler.busy:
            for event in scheduler.step():
                if event.completion is None:
                    continue
                index = indices[event.request]
                samples = done.setdefault(index, {})
                samples[event.sample] = event.completion
                if len(samples) == len(requests[index].options):
                    del done[index]
                    yield index, [samples[i] for i in range(len(samples))]

    return completions()


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


def _turns(requests: Sequence[Request], window: int) -> Iterator[int]:
    """Yields requests window by window, in each by length: the first do not wait for the last."""
    for first in range(0, len(requests), window):
        some = range(first, min(first + window, len(requests)))
        yield from sorted(some, key=lambda i: len(requests[i].ids))


def _rows_to_read(length: int, rows: int) -> int:
    """Prompts that are read together: one number for a length, so that each has one program."""
    return max(min(PREFILL_TOKENS // length, rows), 1)
