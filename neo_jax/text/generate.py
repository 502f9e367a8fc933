"""Prompts in, texts out: what surrounds the engine, which knows ids and nothing else."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from neo_jax.axes import Params
from neo_jax.decode import engine
from neo_jax.decode.beam import BeamOptions
from neo_jax.decode.sampling import SamplingOptions, make_settings
from neo_jax.decode.scheduler import Request, complete, in_order
from neo_jax.decode.speculative import NUM_DRAFTED, Draft
from neo_jax.decode.strategies import BeamSearch, Method, Speculation
from neo_jax.devices.memory import machine_bytes
from neo_jax.errors import NeoError, brief, check_numbers, suggest
from neo_jax.model.transformer import Neo
from neo_jax.text.tokenizer import StreamDecoder, Tokenizer

Prompt = str | Sequence[int]
"""Text, or token ids."""

Overflow = Literal["error", "truncate"]
"""What becomes of a prompt that does not fit the context: refused, or cut to its newest tokens."""


MAX_NEW_TOKENS = 64
"""Where a text stops at the latest, unless told."""

BATCH_SIZE = 16
"""Completions that are written at one time, unless told."""

_SAMPLE_BYTES, _TOKEN_BYTES = 700, 70  # what Python takes for a sample, and for each of its tokens


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What a user says about texts, beside how their tokens are chosen.

    Raises:
      NeoError: a value of another kind or out of its range, or samples that memory cannot hold.
    """

    max_new_tokens: int = MAX_NEW_TOKENS  # where to stop at the latest
    num_samples: int = 1  # for each prompt
    stop: str | Sequence[str] | None = ()  # strings before which a text ends; then a tuple of them
    batch_size: int = BATCH_SIZE  # texts that are written at one time
    on_overflow: Overflow = "error"
    num_drafted: int = NUM_DRAFTED  # tokens that a draft proposes at a time

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("max_new_tokens", "num_samples", "batch_size", "num_drafted"):
            if getattr(self, name) < 1:
                raise NeoError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.on_overflow not in get_args(Overflow):
            raise NeoError(
                f"on_overflow must be 'error' or 'truncate', not {brief(self.on_overflow)}."
            )
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stops or (), Iterable) or not all(
            isinstance(stop, str) for stop in stops or ()
        ):
            raise NeoError(f"stop must be a text or a list of texts, not {brief(self.stop)}.")
        object.__setattr__(self, "stop", tuple(stops or ()) if self.stop else ())
        needed = self.num_samples * (_SAMPLE_BYTES + _TOKEN_BYTES * self.max_new_tokens)
        if needed > machine_bytes():
            raise NeoError(
                f"{self.num_samples} samples of a prompt, which are held until all are there, may "
                f"take {needed / 1e9:,.0f} GB of this machine's {machine_bytes() / 1e9:.0f}; take "
                "fewer at a time, each time with another seed."
            )


@dataclasses.dataclass(frozen=True)
class Sample:
    """One completion of one prompt."""

    prompt: Prompt
    text: str | None  # what was generated, without the prompt; None without a tokenizer
    ids: list[int]  # the new tokens; the last may reach into a stop string, where the text ends
    logprobs: list[float]  # the model's log p of each, in nats, before temperature and truncation
    finish_reason: str  # "eos", "stop" or "length"
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
    first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
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
        self._ends: list[int] = []  # characters of the text after each id

    def push(self, ids: Sequence[int]) -> int | None:
        """Takes new ids; returns how many of all belong to the text where it stops, else None."""
        for token in ids:
            before = len(self.text)
            self.text += self._decoder.push([token])
            self._ends.append(len(self.text))
            if self._cut(before):
                return next(i for i, end in enumerate([0, *self._ends]) if end >= len(self.text))
        return None

    def flush(self) -> None:
        """Ends a text that did not stop: adds what an unfinished character holds back."""
        if not self.stopped:
            before = len(self.text)
            self.text += self._decoder.flush()
            self._cut(before)

    def settled(self) -> int:
        """Returns how many characters will stay, whatever comes: the rest may begin a stop."""
        if self.stopped:
            return len(self.text)
        starts = (stop[:size] for stop in self._stops for size in range(1, len(stop)))
        return len(self.text) - max((len(s) for s in starts if self.text.endswith(s)), default=0)

    def _cut(self, before: int) -> bool:
        """Looks for stops that end beyond the first characters."""
        found = [self.text.find(stop, max(before - len(stop) + 1, 0)) for stop in self._stops]
        places = [place for place in found if place >= 0]
        if places:
            self.text = self.text[: min(places)]
            self.stopped = True
        return self.stopped


def fit(model: Neo, ids: list[int], asked: TextOptions) -> list[int]:
    """Returns the tokens of a prompt that the model will read.

    Raises:
      NeoError: see `engine.check_prompts`.
    """
    room = model.config.max_length - asked.max_new_tokens
    if asked.on_overflow == "truncate" and room > 0:
        ids = ids[-room:]
    engine.check_prompts(model, [ids], asked.max_new_tokens)
    return ids


def read_options(options: dict[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
    """Sorts the options of `LanguageModel.generate` by name.

    Returns:
      Those of sampling, and arguments of `LanguageModel.samples`.

    Raises:
      NeoError: an unknown option, or a value that is out of its range.
    """
    kinds = [
        [field.name for field in dataclasses.fields(kind)]
        for kind in (SamplingOptions, BeamOptions)
    ]
    others = ["stop", "batch_size", "on_overflow", "draft", "num_drafted"]
    known = [name for names in (*kinds, others) for name in names]
    for name in options:
        if name not in known:
            raise NeoError(f"unknown option '{name}'.{suggest(name, known)}")
    sampling, beams = ({n: options[n] for n in names if n in options} for names in kinds)
    arguments = {name: options[name] for name in others if name in options}
    if beams:
        arguments["beams"] = BeamOptions(**beams)
    return SamplingOptions(**sampling), arguments


def allowed(model: Neo, options: SamplingOptions) -> SamplingOptions:
    """Returns options as a model can follow them: the end of text alone is no bad word.

    Raises:
      NeoError: an id outside the vocabulary, or none that may be written.
    """
    config = model.config
    forced = (options.forced_bos_token_id, options.forced_eos_token_id)
    for i in (*forced, *(i for ids, _ in options.bans for i in ids)):
        if i >= config.vocab_size:
            raise NeoError(
                f"token id {i} is not in the vocabulary, 0 to {config.vocab_size - 1}; leave it "
                "out of what is suppressed or forced."
            )
    words = tuple(
        word for word in options.bad_words_ids if word not in [(i,) for i in config.eos_ids]
    )
    options = dataclasses.replace(options, bad_words_ids=words)
    if len({ids for ids, _ in options.bans if len(ids) == 1}) >= config.vocab_size:
        raise NeoError("every token is suppressed, and none can be written; suppress fewer.")
    return options


def reseeded(options: SamplingOptions, sample: int) -> SamplingOptions:
    """Returns the options of a prompt's sample of this index."""
    return dataclasses.replace(options, seed=(options.seed + sample) % 2**32)


def spread(
    sampling: SamplingOptions | Sequence[SamplingOptions], num_prompts: int
) -> Sequence[SamplingOptions]:
    """Returns the options of each prompt, where those of all may be told at once.

    Raises:
      NeoError: they are something else, or as many as something else.
    """
    several = [sampling] * num_prompts if isinstance(sampling, SamplingOptions) else sampling
    if not isinstance(several, Sequence) or not all(
        isinstance(options, SamplingOptions) for options in several
    ):
        raise NeoError(f"sampling must be SamplingOptions, or a list, not {brief(sampling)}.")
    if len(several) != num_prompts:
        raise NeoError(f"{len(several)} sampling options do not match {num_prompts} prompts.")
    return several


def check_together(
    sampling: Iterable[SamplingOptions], text: TextOptions, beams: BeamOptions, has_draft: bool
) -> None:
    """Checks that every option that says something other than its default has an effect.

    Raises:
      NeoError: one has none beside the others; the message names it.
    """
    plain = SamplingOptions()
    if not isinstance(beams, BeamOptions):
        raise NeoError(f"beams must be BeamOptions, not {brief(beams)}.")
    if beams.num_beams > 1 and has_draft:
        raise NeoError("a draft does not help beam search; leave out one of the two.")
    for options in sampling if beams.num_beams > 1 else ():
        for name in ("temperature", "top_k", "top_p", "min_p", "seed"):
            value = getattr(options, name)
            if value != getattr(plain, name) and (name, value) != ("temperature", 0):
                raise NeoError(
                    f"{name} has no effect on beam search, which draws nothing; leave it out, or "
                    "num_beams."
                )
    for name in ("length_penalty", "early_stopping"):
        if beams.num_beams == 1 and getattr(beams, name) != getattr(BeamOptions(), name):
            raise NeoError(f"{name} has no effect without beams; raise num_beams, or leave it out.")
    if text.num_drafted != NUM_DRAFTED and not has_draft:
        raise NeoError("num_drafted has no effect without a draft; name one, or leave it out.")


def make_method(beams: BeamOptions, draft: Draft | str | None, num_drafted: int) -> Method:
    """Returns how ids are continued.

    Raises:
      NeoError: the draft is neither a model nor "prompt".
    """
    if draft is None:
        return complete if beams.num_beams == 1 else BeamSearch(beams)
    if draft != "prompt" and not isinstance(draft, Draft):
        raise NeoError(f"draft {brief(draft)} is neither a loaded model nor 'prompt'.")
    return Speculation(None if isinstance(draft, str) else draft, num_drafted)


def samples(
    model: Neo,
    params: Params,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    sampling: Sequence[SamplingOptions],
    asked: TextOptions,
    on_finish: Callable[[int, list[Sample]], None] | None = None,
    method: Method = complete,
) -> Iterator[Sample]:
    """Yields the samples of each prompt, in the order of the prompts.

    Args:
      model: the model.
      params: its parameters.
      tokenizer: decodes ids; None yields samples without text.
      prompts: as they were given.
      ids: of each prompt, as the model will read it.
      sampling: options for each prompt; each of its samples has a seed of its own.
      asked: where texts end and how many there are; strings to stop at need a tokenizer.
      on_finish: called with the index of each prompt and its samples as soon as all are there.
      method: how ids are continued.
    """
    count = range(asked.num_samples)
    stop = asked.stop or ()
    texts: list[list[StopText]] = [
        [StopText(tokenizer, prompt, stop) for _ in count] if tokenizer and stop else []
        for prompt in ids
    ]
    requests = [
        Request(
            prompt,
            asked.max_new_tokens,
            [reseeded(allowed(model, options), i) for i in count],
            [text.push for text in watched],
        )
        for prompt, options, watched in zip(ids, sampling, texts, strict=True)
    ]

    def finished() -> Iterator[tuple[int, list[Sample]]]:
        for index, done in method(model, params, requests, asked.batch_size):
            made = []
            for i, new in enumerate(done):
                text = texts[index][i] if texts[index] else None
                if text is None and tokenizer:
                    text = StopText(tokenizer, ids[index], ())
                    text.push(new.ids)
                if text:
                    text.flush()
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
    asked: TextOptions,
) -> Iterator[str]:
    """Yields the new text of one prompt as it comes, never a part of a stop string."""
    text = StopText(tokenizer, ids, asked.stop or ())
    shown = 0
    settings = make_settings(allowed(model, sampling), [sampling.seed])
    for token in engine.stream(model, params, ids, asked.max_new_tokens, settings):
        text.push([token])
        if text.settled() > shown:
            yield text.text[shown : text.settled()]
            shown = text.settled()
        if text.stopped:
            return
    text.flush()
    if len(text.text) > shown:
        yield text.text[shown:]
