"""Continuous batching: requests arrive and leave at any time, and share the rows of one batch.

A prompt is read once, however many samples of it are drawn, and enters the batch; a row whose text
is finished, or was cancelled, takes the next text in the next step. The batch's capacity, which
grows and shrinks, is that of its longest text. A text depends on its prompt, its options and its
seed: not on the other rows or its turn.

Prompts are read whole, as many as there are free rows, which is fastest; or a chunk a step, so that
texts that are being written wait for one chunk at most. With chunks, what a prompt says of itself
can be requested too: `Request.prompt`.

Programs are few, whatever the requests. With c capacities (`capacity.capacity`), b padded lengths
of prompts (these, 16 and 32) and the same number of rows: at most b to read prompts, c for an empty
batch, b c to insert them, or to read what begins a batch into it, c to write, c to stop rows, and
c c to change the capacity. With chunks c is smaller (`capacity.coarse_capacity`), b counts lengths
up to a chunk, each with one row and with as many as a chunk holds, and three more, and there are r
numbers of rows (`capacity.row_sizes`): r times as many of all but what reads prompts, and r r c to
change the number of rows.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.engine import Completion
from neo_jax.decode.options import ROOM, Room, room_for
from neo_jax.decode.prefixes import PrefixCache
from neo_jax.decode.readers import ChunkReader, Queue, Reader, WholeReader
from neo_jax.decode.requests import Event, PromptRead, Request, Text
from neo_jax.decode.state import (
    CHECKED_STEPS,
    DecodeState,
    empty_state,
    resize,
    stop_rows,
    take_rows,
)
from neo_jax.devices.processes import to_host
from neo_jax.errors import NeoError
from neo_jax.model.soft_prompt import soft_prompt_ids
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import padded_rows

PATIENCE = 16  # steps after which rows that nobody needs are given up
WINDOW = 16  # requests for each row that `complete` brings in order of length

T = TypeVar("T")


class Scheduler:
    """Rows of one batch, and the requests that wait for them.

    All processes of a run must make the same calls.
    """

    def __init__(
        self,
        model: Neo,
        params: Params,
        rows: int,
        room: Room = ROOM,
        chunk: int | None = None,
        prefix_bytes: int = 0,
    ):
        """Allocates nothing yet.

        Args:
          model: the model.
          params: its parameters.
          rows: texts that are written at one time.
          room: for what requests ban, favour and want to see.
          chunk: tokens of prompts that are read in a step; None reads them whole.
          prefix_bytes: that may be kept of prompts which were read by chunks, for others that begin
            as they do.
        """
        self._model, self._params, self._room, self.max_rows = model, params, room, rows
        whole = (model, params, padded_rows(model.sharding, rows), room)
        self._reader: Reader = (
            WholeReader(*whole) if chunk is None else ChunkReader(*whole, chunk, prefix_bytes)
        )
        self._sizes = self._reader.row_sizes
        self._rows: list[Text | None] = []
        self._running = np.zeros(0, bool)  # rows on the device, if they are not stopped
        self._spare = 0  # steps for which fewer rows would have been enough
        self._state: DecodeState | None = None
        self._queue: Queue = deque()
        self._waiting: deque[Text] = deque()  # for rows; their prompts have been read
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether a request is not finished."""
        return bool(self._queue or self._reader.reading or self._waiting or any(self._rows))

    @property
    def queued(self) -> list[int]:
        """Requests whose prompts nobody has begun to read, in their order."""
        return [id for id, _ in self._queue]

    @property
    def prefixes(self) -> PrefixCache | None:
        """What is kept of prompts that were read by chunks."""
        return self._reader.prefixes

    @property
    def num_running(self) -> int:
        """Rows that write."""
        return sum(text is not None for text in self._rows)

    def check(self, request: Request) -> None:
        """Checks that a request can be done.

        Raises:
          NeoError: see `check`; or it has more bans, biases or alternatives than there is room for.
        """
        check(self._model, [request], self.max_rows)
        needed = room_for(request.options)._replace(alternatives=request.num_alternatives)
        for name, most, count in zip(Room._fields, self._room, needed, strict=True):
            if count > most:
                words = name.replace("_", " ")
                raise NeoError(f"a request needs room for {count} {words}, not {most}; take fewer.")

    def submit(self, request: Request) -> int:
        """Queues a request; returns the id by which events name it.

        A model with a soft prompt reads it first.

        Raises:
          NeoError: see `Scheduler.check`.
        """
        self.check(request)
        self._submitted += 1
        if lead := soft_prompt_ids(self._model):
            request = dataclasses.replace(request, ids=[*lead, *request.ids])
        self._queue.append((self._submitted, request))
        return self._submitted

    def cancel(self, id: int, sample: int | None = None) -> None:
        """Drops what is not finished of a request; the next step gives its rows to others.

        With a sample it drops that one alone, once its prompt has been read.
        """
        if sample is None:
            self._queue = deque(entry for entry in self._queue if entry[0] != id)
            self._reader.cancel(id)

        def stays(text: Text) -> bool:
            return text.id != id or sample not in (None, text.sample)

        self._waiting = deque(filter(stays, self._waiting))
        self._rows = [text if text and stays(text) else None for text in self._rows]

    def step(self) -> list[Event | PromptRead]:
        """Fills free rows, then writes until a text is finished or is to be looked at.

        Returns:
          What became of prompts and texts; nothing where there are none.
        """
        found: list[Event | PromptRead] = [*self._fill()]
        texts = [text for text in self._rows if text]
        stopped = self._running & np.array([text is None for text in self._rows], bool)
        if stopped.any():
            assert self._state is not None
            self._state = stop_rows(self._model, self._state, stopped)
            self._running &= ~stopped
        if not texts:
            return found
        self._spare = self._spare + 1 if self._size(len(texts)) < len(self._rows) else 0
        if self._spare > PATIENCE:
            self._keep(self._size(len(texts)))
        steps = max(text.request.max_new_tokens for text in texts)
        if any(text.is_watched for text in texts):
            steps = min(steps, CHECKED_STEPS)
        if self._reader.reading or any(text.request.stream for text in texts):
            steps = 1
        enough = len(self._rows) - len(texts) + 1
        self._state = engine.run(self._model, self._params, self._state, steps, enough)
        return found + list(self._events())

    def _fill(self) -> list[PromptRead]:
        """Gives free rows to texts that wait, and reads prompts for what is free then."""
        if self._state is None and self._queue and (begun := self._reader.begin(self._queue)):
            texts, self._state = begun
            size = len(self._state.done)
            self._rows = [*texts, *[None] * (size - len(texts))]
            self._running = np.arange(size) < len(texts)
        self._insert()
        found: list[PromptRead] = []
        while not self._waiting and (self._queue or self._reader.reading):
            if not self._reader.is_patient and self.num_running == self._sizes[-1]:
                break
            texts, read = self._reader.read(self._queue)
            self._waiting += texts
            found += read
            self._insert()
            if self._reader.is_patient:
                break
        return found

    def _insert(self) -> None:
        """Puts texts whose prompts were read into free rows."""
        running = self.num_running
        count = min(self._sizes[-1] - running, len(self._waiting))
        if not count:
            return
        texts = [self._waiting.popleft() for _ in range(count)]
        model, size = self._model, self._size(running + count)
        slots = self._reader.capacity(max(text.length for text in (*self._rows, *texts) if text))
        if self._state is None or (not running and size != len(self._rows)):
            self._rows, self._running = [None] * size, np.zeros(size, bool)
            self._state = empty_state(model, size, slots, self._room)
        if size > len(self._rows):
            self._keep(size)
        if self._state.tokens.shape[1] != slots:
            self._state = resize(model, slots, self._state)
        free = (row for row, text in enumerate(self._rows) if text is None)
        new = dict(zip(free, texts, strict=False))
        for row, text in new.items():
            self._rows[row], self._running[row] = text, True
        self._state = self._reader.insert(self._state, new)

    def _size(self, count: int) -> int:
        """Returns the least number of rows for so many texts."""
        return next(size for size in self._sizes if size >= count)

    def _keep(self, size: int) -> None:
        """Gives the batch another number of rows; texts move to the first ones."""
        rows = [row for row, text in enumerate(self._rows) if text]
        sources = np.array(rows + [0] * (size - len(rows)), np.int32)
        self._rows = [self._rows[row] for row in rows] + [None] * (size - len(rows))
        self._running, self._spare = np.arange(size) < len(rows), 0
        assert self._state is not None
        self._state = take_rows(self._model, self._state, sources, len(rows))

    def _events(self) -> Iterator[Event]:
        """Takes texts that are finished out of the batch."""
        state = self._state
        assert state is not None
        done, *leaves = map(
            to_host,
            (state.done, state.tokens, state.logprobs, state.lengths, state.prompt_lengths),
        )
        self._running = ~done
        kept = []
        if any(text and text.request.num_alternatives for text in self._rows):
            kept = [to_host(leaf) for leaf in state.alternatives]
        for row, text in enumerate(self._rows):
            if text is None or not (done[row] or text.is_watched):
                continue
            tokens, logprobs, length, start = (leaf[row] for leaf in leaves)
            endless = text.options.ignore_eos
            written = engine.completion(self._model, tokens, logprobs, length, start, endless)
            new = slice(text.reported, len(written.ids))
            text.reported = new.stop
            checks = text.request.stop_checks
            keep = checks[text.sample](written.ids[new]) if checks else None
            whole = written
            if keep is not None:
                whole = Completion(written.ids[:keep], written.logprobs[:keep], "stop")
            finished = bool(done[row]) or keep is not None
            if finished:
                self._rows[row] = None
            yield Event(
                text.id,
                text.sample,
                written.ids[new],
                written.logprobs[new],
                whole if finished else None,
                _alternatives([leaf[row] for leaf in kept], text, new),
            )


def _alternatives(
    kept: Sequence[np.ndarray], text: Text, new: slice
) -> list[list[tuple[int, float]]]:
    """Returns the alternatives of some new tokens, of what a row keeps: [R, K] ids and log p."""
    count, start = text.request.num_alternatives, len(text.request.ids)
    if not count:
        return []
    places = [(start + i) % CHECKED_STEPS for i in range(new.start, new.stop)]
    ids, logprobs = (leaf[places, :count].tolist() for leaf in kept)
    return [list(zip(*pairs, strict=True)) for pairs in zip(ids, logprobs, strict=True)]


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
    room = room_for(each for request in requests for each in request.options)
    scheduler = Scheduler(model, params, rows, room)
    indices = {scheduler.submit(requests[i]): i for i in _turns(requests, WINDOW * max(rows, 1))}

    def completions() -> Iterator[tuple[int, list[Completion]]]:
        done: dict[int, dict[int, Completion]] = {}
        while scheduler.busy:
            for event in scheduler.step():
                if isinstance(event, PromptRead) or event.completion is None:
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
        if request.options:
            engine.check_prompts(model, [request.ids], request.max_new_tokens)
        else:
            engine.check_tokens(model, request.ids)
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
