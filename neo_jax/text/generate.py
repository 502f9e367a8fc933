"""Prompts in, texts out: what is around the engine, which knows ids and nothing else."""

import bisect
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.options import BeamOptions, SamplingOptions, make_settings
from neo_jax.decode.requests import Request
from neo_jax.decode.scheduler import complete, in_order
from neo_jax.decode.speculative import Draft
from neo_jax.decode.strategies import Strategy, search_beams, speculate
from neo_jax.errors import NeoError, brief
from neo_jax.model.soft_prompt import text_context
from neo_jax.model.transformer import Neo
from neo_jax.text.options import TextOptions, allowed, reseeded
from neo_jax.text.tokenizer import StreamDecoder, Tokenizer
from neo_jax.text.word_filter import FilteredText, WordFilter

Prompt = str | Sequence[int]
"""Text, or token ids."""

_LEAD = 128  # tokens of a prompt in which a word of a filter may begin


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt: Prompt
    text: str | None  # what was generated, without the prompt; None without a tokenizer
    ids: list[int]  # the new tokens; the last may reach into a stop string, where the text ends
    logprobs: list[float]  # the model's log p of each, in nats, before temperature and truncation
    finish_reason: str  # "eos", "stop", "length" or "content_filter"
    score: float | None = None  # in beam search: what texts are compared by
    drafted: int | None = None  # in speculative decoding: tokens of the draft that were judged
    accepted: int | None = None  # and those of them that were taken

    def fields(self) -> dict[str, Any]:
        """Returns the fields by name, without those at the end that are None."""
        optional = ("score", "drafted", "accepted")
        fields = dataclasses.asdict(self)
        return {n: value for n, value in fields.items() if not (n in optional and value is None)}


class StopText:
    """The new text of one completion as its ids arrive, which ends before any of some strings.

    Where several occur, that one counts which is complete with the fewest ids, and of these the
    first. It ends before a word of a filter too; then what shows it is not among its ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        words: WordFilter | None = None,
    ):
        """Begins after a prompt.

        Raises:
          NeoError: a stop string is empty.
        """
        if not all(stops):
            raise NeoError("a stop string is empty; it would stop every text at once.")
        self.text = ""  # what is known of it; up to the stop string
        self.stopped = False
        self._decoder = StreamDecoder(tokenizer, prompt)
        self._stops = stops
        self._filter: FilteredText | None = None
        if words:
            self._filter = FilteredText(words, tokenizer.decode(prompt[-_LEAD:]))
        self._ends: list[int] = []  # characters of the text after each id
        self._shown = 0  # characters that `new` returned

    @property
    def is_filtered(self) -> bool:
        """Whether it ends before a word of the filter."""
        return self._filter is not None and self._filter.found is not None

    def push(self, ids: Sequence[int]) -> int | None:
        """Takes new ids; returns how many of all belong to the text where it stops, else None."""
        for token in ids:
            before = len(self.text)
            self.text += self._decoder.push([token])
            self._ends.append(len(self.text))
            self._cut(before)
            self._withhold(is_whole=self.stopped)
            if self.is_filtered:
                return self.settled_ids()
            if self.stopped:
                return next(i for i, end in enumerate([0, *self._ends]) if end >= len(self.text))
        return None

    def flush(self) -> None:
        """Ends a text that did not stop: adds what an unfinished character holds back."""
        if not self.stopped:
            before = len(self.text)
            self.text += self._decoder.flush()
            self._cut(before)
            self._withhold(is_whole=True)

    def new(self, is_finished: bool = False) -> str:
        """Returns the text that was not returned before and will stay; at the end all of it."""
        if is_finished:
            self.flush()
        start, self._shown = self._shown, len(self.text) if is_finished else self.settled()
        return self.text[start : self._shown]

    def settled(self) -> int:
        """Returns how many characters will stay, whatever comes: the rest may begin a stop."""
        if self.stopped:
            return len(self.text)
        return self._filter.settled if self._filter else self._unstopped()

    def settled_ids(self) -> int:
        """Returns how many ids show nothing beyond the characters that will stay."""
        return bisect.bisect_right(self._ends, self.settled())

    def _unstopped(self) -> int:
        starts = (stop[:size] for stop in self._stops for size in range(1, len(stop)))
        return len(self.text) - max((len(s) for s in starts if self.text.endswith(s)), default=0)

    def _withhold(self, is_whole: bool) -> None:
        """Looks for words of the filter in what stops let through."""
        if self._filter:
            text = self.text if is_whole else self.text[: self._unstopped()]
            if self._filter.look(text, is_whole) and self._filter.found:
                self.text = self.text[: self._filter.found.start]
                self.stopped = True

    def _cut(self, before: int) -> None:
        """Looks for stops that end beyond the first characters."""
        found = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stops]
        places = [place for place in found if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = True


def fit(model: Neo, ids: list[int], options: TextOptions) -> list[int]:
    """Returns the tokens of a prompt that the model will read.

    Raises:
      NeoError: see `engine.check_prompts`.
    """
    room = text_context(model) - options.max_new_tokens
    if options.on_overflow == "truncate" and room > 0:
        ids = ids[-room:]
    engine.check_prompts(model, [ids], options.max_new_tokens)
    return ids


def make_strategy(beams: BeamOptions, draft: Draft | str | None, num_drafted: int) -> Strategy:
    """Returns how ids are continued.

    Raises:
      NeoError: the draft is neither a model nor "prompt".
    """
    if draft is None:
        return complete if beams.num_beams == 1 else functools.partial(search_beams, beams)
    if draft != "prompt" and not isinstance(draft, Draft):
        raise NeoError(f"draft {brief(draft)} is neither a loaded model nor 'prompt'.")
    return functools.partial(speculate, None if isinstance(draft, str) else draft, num_drafted)


def samples(
    model: Neo,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    sampling: Sequence[SamplingOptions],
    options: TextOptions,
    on_finish: Callable[[int, list[Sample]], None] | None = None,
    strategy: Strategy = complete,
    words: WordFilter | None = None,
) -> Iterator[Sample]:
    """Yields the samples of each prompt, in the order of the prompts.

    Prompts are as they were given, `ids` what the model will read. Without a tokenizer samples have
    no text, and there are no strings to stop at. Each sample of a prompt has a seed of its own.
    `on_finish` is called with the index of each prompt and its samples as soon as all are there.
    Texts end before `words`.
    """
    count = range(options.num_samples)
    texts: list[list[StopText]] = [
        [StopText(tokenizer, prompt, options.stop, words) for _ in count]
        if tokenizer and (options.stop or words)
        else []
        for prompt in ids
    ]
    requests = [
        Request(
            prompt,
            options.max_new_tokens,
            [reseeded(allowed(model, each), i) for i in count],
            [text.push for text in checked],
        )
        for prompt, each, checked in zip(ids, sampling, texts, strict=True)
    ]

    def finished() -> Iterator[tuple[int, list[Sample]]]:
        for index, done in strategy(model, params, requests, options.batch_size):
            made = []
            for i, new in enumerate(done):
                text = texts[index][i] if texts[index] else None
                if text is None and tokenizer:
                    text = StopText(tokenizer, ids[index], ())
                    text.push(new.ids)
                if text:
                    text.flush()
                if text and text.is_filtered:
                    kept = text.settled_ids()
                    new = new._replace(ids=new.ids[:kept], logprobs=new.logprobs[:kept])
                    new = new._replace(finish_reason="content_filter")
                made.append(Sample(prompts[index], text.text if text else None, *new))
            texts[index] = []
            if on_finish:
                on_finish(index, made)
            yield index, made

    for made in in_order(finished()):
        yield from made


def stream(
    model: Neo,
    params: Params,
    tokenizer: Tokenizer,
    ids: list[int],
    sampling: SamplingOptions,
    options: TextOptions,
    words: WordFilter | None = None,
) -> Iterator[str]:
    """Yields the new text of one prompt as it comes, never a part of a stop or of `words`."""
    text = StopText(tokenizer, ids, options.stop, words)
    settings = make_settings(allowed(model, sampling), [sampling.seed])
    for token in engine.stream(model, params, ids, options.max_new_tokens, settings):
        text.push([token])
        if new := text.new():
            yield new
        if text.stopped:
            return
    if new := text.new(is_finished=True):
        yield new
