"""The engine of a server: one thread owns the model, and works for many clients at a time.

Clients submit jobs and get what becomes of them in pieces. The thread alone touches the scheduler;
everything else is a queue to it, and a callback from it.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from neo_jax.decode.lockstep import LeadingScheduler
from neo_jax.decode.options import SamplingOptions, room_for
from neo_jax.decode.requests import Event, PromptRead, Request
from neo_jax.decode.scheduler import Scheduler
from neo_jax.devices.channel import Channel
from neo_jax.model.soft_prompt import text_context
from neo_jax.serving.jobs import (
    CHUNK,
    Busy,
    Delta,
    Job,
    PromptFound,
    Writer,
    allowed_token,
    new_tokens,
    prompt_tokens,
)
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.protocol import MOST_BIASES
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.options import pick
from neo_jax.text.tokenizer import Tokenizer
from neo_jax.text.word_filter import WordFilter

_LOG = logging.getLogger(__name__)


Item = PromptFound | Delta
Listener = Callable[[int, Item | Exception], None]
"""Takes the index of a job and what is new of it, or what ended all of them."""


class _Work:
    """A job in the scheduler, or on its way there."""

    def __init__(
        self,
        job: Job,
        index: int,
        listener: Listener,
        tokenizer: Tokenizer | None,
        words: WordFilter | None,
    ):
        self.job, self.listener, self.index = job, listener, index
        self.writers = [Writer(tokenizer, job, words) for _ in job.options]
        self.left = set(range(len(job.options)))  # samples that are not finished
        self.arrived = self.last = time.monotonic()
        self.admitted = self.first = 0.0  # when its prompt began to be read, and its first token
        self.new_tokens = 0

    def request(self) -> Request:
        """Returns what the scheduler is asked for."""
        job = self.job
        return Request(
            job.ids,
            job.max_new_tokens,
            job.options,
            [writer.check for writer in self.writers],
            stream=True,
            num_alternatives=job.num_alternatives,
            prompt_logprobs=job.prompt_alternatives is not None,
            prompt_pool=job.pool,
        )

    def send(self, item: Item) -> None:
        """Tells the client."""
        self.listener(self.index, item)


def make_scheduler(
    lm: LanguageModel,
    max_sequences: int = 16,
    max_alternatives: int = 20,
    prefix_bytes: int = 0,
    channel: Channel | None = None,
) -> Scheduler:
    """Returns a scheduler for an engine, or for `lockstep.follow` in other processes.

    Args:
      lm: the model.
      max_sequences: texts that are written at one time; others wait.
      max_alternatives: likeliest tokens that a job may want.
      prefix_bytes: that may be kept of prompts, for others that begin as they do.
      channel: to other processes, which follow.
    """
    room = room_for([SamplingOptions(**pick(dict(lm.defaults.options), SamplingOptions))])
    alternatives = min(max_alternatives, lm.config.vocab_size)
    room = room._replace(biases=MOST_BIASES, alternatives=alternatives)
    taken = (lm.model, lm.params, max_sequences, room, CHUNK, prefix_bytes)
    return LeadingScheduler(channel, *taken) if channel else Scheduler(*taken)


class Engine:
    """Works for clients until it is closed. Any thread may call all methods."""

    def __init__(
        self,
        lm: LanguageModel,
        scheduler: Scheduler,
        metrics: Metrics,
        *,
        max_queued_requests: int = 256,
        max_queued_tokens: int = 0,
        words: WordFilter | None = None,
    ):
        """Starts nothing yet.

        Args:
          lm: the model.
          scheduler: see `make_scheduler`.
          metrics: is told of what happens.
          max_queued_requests: jobs that may wait.
          max_queued_tokens: tokens of prompts that may wait; 0 is any number.
          words: before which texts end.
        """
        self._lm, self._scheduler, self._metrics, self._words = lm, scheduler, metrics, words
        self._most_jobs, self._most_tokens = max_queued_requests, max_queued_tokens
        self._changed = threading.Condition()
        # Of what follows, changes are made with `_changed` held.
        self._arrived: list[_Work] = []
        self._left: list[_Work] = []  # by their clients
        self._waiting: dict[_Work, int] = {}  # works that nobody has begun, and their tokens
        self._open: dict[_Work, None] = {}  # all that are not finished
        self._failure: Exception | None = None
        self._draining = self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(
            lambda: self.num_running,
            lambda: self.num_waiting,
            lambda: self.num_running / scheduler.max_rows,
        )

    @property
    def num_running(self) -> int:
        """Texts that are being written."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Jobs that nobody has begun."""
        return len(self._waiting)

    @property
    def is_healthy(self) -> bool:
        """Whether new jobs are taken."""
        return self._thread.is_alive() and not self._draining and self._failure is None

    def start(self) -> None:
        """Compiles what most jobs need, and begins to work."""
        new = min(100, text_context(self._lm.model) - 1)  # most have a capacity of 128 tokens
        warm = Request([0], new, [SamplingOptions()], stream=True)
        if self._lm.config.head.is_classifier:
            warm = Request([0], 0, [], prompt_pool="last")
        warm_id = self._scheduler.submit(warm)
        self._scheduler.step()
        self._scheduler.cancel(warm_id)
        self._scheduler.step()
        self._thread.start()

    def drain(self, seconds: float) -> None:
        """Refuses new jobs; returns when all are finished, those left after some time aborted."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._draining = True
            while self._open and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            for work in list(self._open):
                self._abort(work)
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread."""
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self.wait()

    def wait(self) -> None:
        """Returns when the thread has ended: after `close`, or a failure."""
        if self._thread.is_alive():
            self._thread.join()

    @property
    def has_failed(self) -> bool:
        """Whether nothing will be written any more."""
        return self._failure is not None

    def fail(self, error: Exception) -> None:
        """Tells all clients that this is the end."""
        with self._changed:
            self._failure = error
            for work in self._open:
                work.listener(work.index, RuntimeError("the engine has failed"))
            self._open.clear()
            self._changed.notify_all()

    async def run(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Item], None]:
        """Yields the index of a job and what is new of it; leaving the iterator drops the jobs.

        All jobs are queued, or none.

        Raises:
          Busy: before anything else.
          NeoError: a job that cannot be done; before anything else.
          RuntimeError: the engine has failed.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Item | Exception]]()

        def listen(index: int, item: Item | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and so has the client
                loop.call_soon_threadsafe(news.put_nowait, (index, item))

        works = self._submit(jobs, listen)
        left = sum(max(len(job.options), 1) for job in jobs)
        try:
            while left:
                index, item = await news.get()
                if isinstance(item, Exception):
                    raise item
                # A job without texts is done with its prompt.
                left -= isinstance(item, Delta) and item.finish_reason is not None
                left -= isinstance(item, PromptFound) and not jobs[index].options
                yield index, item
        finally:
            with self._changed:
                self._left += works
                self._changed.notify_all()

    def _submit(self, jobs: Sequence[Job], listener: Listener) -> list[_Work]:
        tokenizer = self._lm.tokenizer
        works = [_Work(job, i, listener, tokenizer, self._words) for i, job in enumerate(jobs)]
        for work in works:
            self._scheduler.check(work.request())
        tokens = sum(len(job.ids) for job in jobs)
        with self._changed:
            if self._failure:
                raise RuntimeError("the engine has failed") from self._failure
            full = (
                self._draining
                or len(self._waiting) + len(jobs) > self._most_jobs
                or 0 < self._most_tokens < sum(self._waiting.values()) + tokens
            )
            if full:
                self._metrics.rejected()
                why = "the server is ending" if self._draining else "too many requests wait"
                raise Busy(f"{why}; try again later.")
            self._arrived += works
            self._waiting |= {work: len(work.job.ids) for work in works}
            self._open |= dict.fromkeys(works)
            self._changed.notify_all()
        for work in works:
            self._metrics.queued(len(work.job.ids))
        return works

    def _run(self) -> None:
        """Is the thread."""
        works: dict[int, _Work] = {}  # by the ids of the scheduler
        try:
            while self._take(works):
                begun, events = time.monotonic(), self._scheduler.step()
                self._admit(works, events, begun)
                for event in events:
                    if work := works.get(event.request):
                        self._tell(work, event)
                self._metrics.step(sum(len(e.ids) for e in events if isinstance(e, Event)))
                if kept := self._scheduler.prefixes:
                    self._metrics.prefixes(kept.queried, kept.hit, kept.num_bytes)
                for id in [id for id, work in works.items() if work not in self._open]:
                    del works[id]
        except Exception as error:
            _LOG.exception("the engine has failed")
            self.fail(error)

    def _take(self, works: dict[int, _Work]) -> bool:
        """Takes what has arrived and drops what was left, waiting for work; False at the end."""
        with self._changed:
            while not (self._arrived or self._left or self._scheduler.busy or self._closing):
                self._changed.wait()
            arrived, self._arrived = self._arrived, []
            left, self._left = self._left, []
            for work in left:
                self._waiting.pop(work, None)
                self._finish(work, "abort")
        ids = {work: id for id, work in works.items()}
        for work in left:
            if work in ids:
                self._scheduler.cancel(ids[work])
                works.pop(ids[work], None)
        for work in arrived:
            if work in self._open:
                works[self._scheduler.submit(work.request())] = work
        return not self._closing

    def _admit(
        self, works: dict[int, _Work], events: Sequence[Event | PromptRead], now: float
    ) -> None:
        """Notes whose prompts began to be read."""
        queued = set(self._scheduler.queued)
        for id, work in works.items():
            if work in self._waiting and id not in queued:
                work.admitted = now
                self._metrics.admitted(now - work.arrived)
                with self._changed:
                    self._waiting.pop(work, None)

    def _tell(self, work: _Work, event: Event | PromptRead) -> None:
        """Tells a client what a step did to its job."""
        now, job = time.monotonic(), work.job
        if isinstance(event, PromptRead):
            self._metrics.read(len(job.ids), now - work.admitted)
            tokens = prompt_tokens(job, event)
            if self._words:
                tokenizer = self._lm.tokenizer
                tokens = [allowed_token(self._words, tokenizer, token) for token in tokens]
            if not job.options:
                self._finish(work, "stop")
            if tokens or job.pool or not job.options:
                work.send(PromptFound(tokens, event.pooled))
            return
        if event.ids:
            waited = now - (work.last if work.first else work.arrived)
            (self._metrics.next_token if work.first else self._metrics.first_token)(waited)
            work.first = work.first or now
            work.last = now
            work.new_tokens += len(event.ids)
        whole = event.completion
        writer = work.writers[event.sample]
        text = writer.new(whole is not None)
        tokens = writer.tokens(new_tokens(event), whole is not None)
        reason = whole and ("length" if whole.finish_reason == "length" else "stop")
        if reason and writer.is_filtered:
            reason = "content_filter"
        if reason:
            work.left.discard(event.sample)
            if not work.left:
                self._finish(work, reason)  # before its client knows, who may look at the counts
        if text or tokens or reason:
            work.send(Delta(event.sample, text, tokens, reason))

    def _abort(self, work: _Work) -> None:
        """Ends a job for its client; `_changed` is held."""
        if not work.job.options:
            work.listener(work.index, Busy("the server is ending; try again later."))
        for sample in sorted(work.left):
            work.send(Delta(sample, "", [], "abort"))
        work.left.clear()
        self._left.append(work)

    def _finish(self, work: _Work, reason: str) -> None:
        """Forgets a job."""
        with self._changed:
            if work not in self._open:
                return
            del self._open[work]
            self._waiting.pop(work, None)
            self._changed.notify_all()
        now = time.monotonic()
        decoding = now - work.first if work.first else 0.0
        self._metrics.finished(reason, now - work.arrived, decoding, work.new_tokens)
