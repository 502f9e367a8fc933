"""How prompts are read for the scheduler: whole, which is fastest, or a chunk at a time."""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from neo_jax.axes import Array, Params
from neo_jax.decode import engine
from neo_jax.decode.capacity import capacity, coarse_capacity, padded_length, row_sizes
from neo_jax.decode.options import Room, SamplingOptions, stack_settings
from neo_jax.decode.pooling import pool_weights
from neo_jax.decode.prefill import Reading, judge, piece_of
from neo_jax.decode.prefixes import PrefixCache
from neo_jax.decode.requests import PromptRead, Request, Text
from neo_jax.decode.state import DecodeState, Entering, insert, insert_read
from neo_jax.devices.processes import to_host
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import padded_rows

PREFILL_TOKENS = 512  # of prompts that are read whole and together, padding included

Queue = deque[tuple[int, Request]]
"""Requests that nobody has begun to read, and their ids."""


class Reader(Protocol):
    """Reads prompts, and puts them into rows."""

    is_patient: bool  # whether a step calls `read` no more than once, free rows or none

    @property
    def reading(self) -> Sequence[int]:
        """Requests whose prompts have been read in part."""
        ...

    @property
    def row_sizes(self) -> Sequence[int]:
        """Numbers of rows that the batch may have, ascending."""
        ...

    @property
    def prefixes(self) -> PrefixCache | None:
        """What is kept of prompts that have been read, if anything is."""
        ...

    def capacity(self, length: int) -> int:
        """Returns the slots of a batch for texts of up to a length."""

    def begin(self, queue: Queue) -> tuple[list[Text], DecodeState] | None:
        """Begins a batch with all that waits, if that is one text a row and can be read at once."""

    def read(self, queue: Queue) -> tuple[list[Text], list[PromptRead]]:
        """Reads on; returns the texts that may now enter the batch, before anything else is read.

        What is taken from the queue is in `reading`, or in what is returned.
        """

    def insert(self, state: DecodeState, rows: Mapping[int, Text]) -> DecodeState:
        """Puts some of the last texts that `read` returned into rows; consumes `state`."""

    def cancel(self, id: int) -> None:
        """Drops a request."""


class WholeReader:
    """Reads prompts of one padded length together."""

    is_patient = False
    reading: Sequence[int] = ()  # none is read in part
    prefixes = None

    def __init__(self, model: Neo, params: Params, rows: int, room: Room):
        """Reads for a batch of so many rows, with a room for settings."""
        self._model, self._params, self._num_rows, self._room = model, params, rows, room
        self._read: DecodeState | None = None

    @property
    def row_sizes(self) -> Sequence[int]:
        """One, for who waits for all texts."""
        return [self._num_rows]

    def capacity(self, length: int) -> int:
        """Returns the slots of a batch for texts of up to a length."""
        return capacity(length, self._model.config.max_length)

    def begin(self, queue: Queue) -> tuple[list[Text], DecodeState] | None:
        """Reads all that waits into the batch itself, which no program then puts into rows."""
        texts = _texts(queue)
        lengths = {self._padded_length(request) for _, request in queue}
        most = _rows_to_read(max(lengths), self._num_rows, PREFILL_TOKENS)
        if len(lengths) > 1 or not len(texts) == len(queue) <= self._num_rows <= most:
            return None
        queue.clear()
        prompts = [(text.request.ids, text.request.max_new_tokens) for text in texts]
        batch = engine.batched(prompts, self._num_rows, *lengths)
        slots = self.capacity(max(text.length for text in texts))
        settings = _entering(dict(enumerate(texts)), self._num_rows, self._room).settings
        return texts, engine.prefill(self._model, slots, self._params, *batch, settings)

    def read(self, queue: Queue) -> tuple[list[Text], list[PromptRead]]:
        """Reads the next prompts of one padded length."""
        model = self._model
        length = self._padded_length(queue[0][1])
        rows = padded_rows(model.sharding, _rows_to_read(length, self._num_rows, PREFILL_TOKENS))
        lengths = (self._padded_length(request) for _, request in queue)
        taken = [queue.popleft() for _ in range(_count(lengths, length, rows))]
        prompts = [(request.ids, request.max_new_tokens) for _, request in taken]
        batch = engine.batched(prompts, rows, length)
        settings = stack_settings([SamplingOptions()] * rows, self._room)
        self._read = engine.prefill(model, length, self._params, *batch, settings)
        return _texts(taken), []

    def _padded_length(self, request: Request) -> int:
        slots = self.capacity(len(request.ids) + request.max_new_tokens)
        return padded_length(len(request.ids), slots)  # never longer than the batch's capacity

    def insert(self, state: DecodeState, rows: Mapping[int, Text]) -> DecodeState:
        """Puts some of the last texts into rows."""
        assert self._read is not None
        entering = _entering(rows, state.tokens.shape[0], self._room)
        return insert(self._model, state, self._read, entering)

    def cancel(self, id: int) -> None:
        """Has nothing to drop."""


@dataclasses.dataclass
class _Prompt:
    """A prompt that is being read by chunks, and what is known of it."""

    id: int
    request: Request
    judged: list[list[np.ndarray]] = dataclasses.field(default_factory=list)  # see `Judged`
    pooled: np.ndarray | float = 0.0  # hidden states, each times its weight
    is_wanted: bool = True


class ChunkReader:
    """Reads a chunk of some prompts at a time, and what is wanted of these."""

    is_patient = True

    def __init__(
        self, model: Neo, params: Params, rows: int, room: Room, chunk: int, prefix_bytes: int = 0
    ):
        """Reads for a batch of so many rows, with a room for settings, by chunks of tokens."""
        self._model, self._params, self._num_rows, self._room = model, params, rows, room
        self._chunk = min(chunk, model.config.max_length)
        self.prefixes = PrefixCache(piece_of(self._chunk), prefix_bytes)
        self._prompts: list[_Prompt] = []
        self._now: Reading | None = None  # of these
        self._read: Reading | None = None  # of the texts that `read` returned last

    @property
    def reading(self) -> Sequence[int]:
        """Requests whose prompts have been read in part."""
        return [prompt.id for prompt in self._prompts if prompt.is_wanted]

    @property
    def row_sizes(self) -> Sequence[int]:
        """A few, for who waits for the next token of one text."""
        sharding = self._model.sharding
        return sorted({padded_rows(sharding, size) for size in row_sizes(self._num_rows)})

    def capacity(self, length: int) -> int:
        """Returns the slots of a batch for texts of up to a length."""
        return coarse_capacity(length, self._model.config.max_length)

    def begin(self, queue: Queue) -> None:
        """Reads by chunks alone."""

    def read(self, queue: Queue) -> tuple[list[Text], list[PromptRead]]:
        """Reads the next chunk."""
        if self._now is None:
            self._begin(queue)
        assert self._now is not None
        start, hidden = self._now.start, self._now.advance()
        self._look_at(start, hidden)
        if self.reading and not self._now.is_done:
            return [], []
        self._read, self._now = self._now, None
        prompts, self._prompts = self._prompts, []
        texts = _texts([(prompt.id, prompt.request) for prompt in prompts])
        wanted = [prompt for prompt in prompts if prompt.is_wanted]
        ids = [prompt.id for prompt in wanted]
        found = [self._found(prompt) for prompt in wanted]
        return [text for text in texts if text.id in ids], found

    def _begin(self, queue: Queue) -> None:
        """Takes prompts: one, or several short ones of a padded length where many wait."""
        model, context = self._model, self._model.config.max_length
        length = padded_length(len(queue[0][1].ids), context)
        most = _rows_to_read(length, self._num_rows, self._chunk)  # together no more than a chunk
        lengths = (padded_length(len(request.ids), context) for _, request in queue)
        alike = _count(lengths, length, most)
        count = alike if 2 * alike > most else 1  # few of them are read one by one sooner
        self._prompts = [_Prompt(*queue.popleft()) for _ in range(count)]
        ids = [prompt.request.ids for prompt in self._prompts]
        rows = padded_rows(model.sharding, most if count > 1 else 1)
        requests = [prompt.request for prompt in self._prompts]
        looked_at = any(each.prompt_logprobs or each.prompt_pool for each in requests)
        prefixes = None if looked_at or rows > 1 or not self.prefixes.most_bytes else self.prefixes
        self._now = Reading(model, self._params, ids, rows, self._chunk, prefixes)

    def _look_at(self, start: int, hidden: Array) -> None:
        """Keeps what is wanted of the chunk that begins at a token."""
        now, end = self._now, start + hidden.shape[1]
        assert now is not None
        judged: list[np.ndarray] = []
        if any(prompt.request.prompt_logprobs for prompt in self._prompts):
            targets = np.pad(now.tokens, ((0, 0), (0, 1)))[:, start + 1 : end + 1]
            count = self._room.alternatives
            judged = [*map(to_host, judge(self._model, count, self._params, hidden, targets))]
        states = None
        if any(prompt.request.prompt_pool for prompt in self._prompts):
            states = to_host(hidden).astype(np.float64)
        for row, prompt in enumerate(self._prompts):
            length = len(prompt.request.ids)
            if judged and prompt.request.prompt_logprobs:
                new = slice(max(length - 1 - start, 0))
                prompt.judged.append([leaf[row, new] for leaf in judged])
            if states is not None and prompt.request.prompt_pool:
                lead = self._model.soft_prompt
                weights = pool_weights(prompt.request.prompt_pool, length - lead)
                weights = np.pad(weights, (lead, 0))[start:end]
                prompt.pooled = prompt.pooled + weights @ states[row, : len(weights)]

    def insert(self, state: DecodeState, rows: Mapping[int, Text]) -> DecodeState:
        """Puts some of the last texts into rows."""
        read = self._read
        assert read is not None
        entering = _entering(rows, state.tokens.shape[0], self._room)
        return insert_read(self._model, state, read.tokens, read.lengths, read.cache, entering)

    def cancel(self, id: int) -> None:
        """Drops a request; what is read together with it goes on."""
        for prompt in self._prompts:
            prompt.is_wanted &= prompt.id != id

    def _found(self, prompt: _Prompt) -> PromptRead:
        """Returns what is known of a prompt, behind the soft prompt."""
        request, lead = prompt.request, self._model.soft_prompt
        pooled = np.asarray(prompt.pooled, np.float32) if request.prompt_pool else None
        if not request.prompt_logprobs:
            return PromptRead(prompt.id, None, None, None, pooled)
        logprobs, ids, likeliest = (
            np.concatenate(leaf)[lead:] for leaf in zip(*prompt.judged, strict=True)
        )
        return PromptRead(prompt.id, logprobs, ids, likeliest, pooled)


def _texts(taken: Iterable[tuple[int, Request]]) -> list[Text]:
    return [
        Text(id, request, sample, row)
        for row, (id, request) in enumerate(taken)
        for sample in range(len(request.options))
    ]


def _count(lengths: Iterable[int], length: int, most: int) -> int:
    """Returns how many of the first lengths are this one, up to a number."""
    alike = itertools.takewhile(lambda other: other == length, lengths)
    return sum(1 for _ in itertools.islice(alike, most))


def _entering(rows: Mapping[int, Text], batch: int, room: Room) -> Entering:
    """Returns texts as they enter a batch of so many rows."""
    texts = list(rows.values())
    fill = [0] * (batch - len(texts))
    options = [text.options for text in texts] + [SamplingOptions()] * len(fill)
    counts = [text.request.num_alternatives for text in texts] + fill
    arrays: dict[str, Any] = {
        "sources": np.array([text.source for text in texts] + fill, np.int32),
        "rows": np.array([*rows, *fill], np.int32),
        "num_texts": np.int32(len(texts)),
        "limits": np.array([text.length for text in texts] + fill, np.int32),
    }
    return Entering(**arrays, settings=stack_settings(options, room, counts))


def _rows_to_read(length: int, rows: int, tokens: int) -> int:
    """Prompts that are read together: one number for a length, so that each has one program."""
    return max(min(tokens // length, rows), 1)
