"""What a user says about generating texts: options of every interface, declared once.

`TextOptions` and, of how tokens are chosen, `SamplingOptions` and `BeamOptions` declare names,
types, defaults, ranges and help. The command line, the methods of `LanguageModel` and
generation_config.json take their options from these classes.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

from neo_jax.decode.options import BeamOptions, SamplingOptions
from neo_jax.decode.speculative import NUM_DRAFTED
from neo_jax.devices.memory import machine_bytes
from neo_jax.errors import NeoError, brief, suggest
from neo_jax.fields import check, choice, converted, number
from neo_jax.model.transformer import Neo
from neo_jax.text.word_filter import WordFilter, read_word_filter

Overflow = Literal["error", "truncate"]
"""What becomes of a prompt that does not fit the context: refused, or cut to its newest tokens."""

_SAMPLE_BYTES, _TOKEN_BYTES = 700, 70  # what Python takes for a sample, and for each of its tokens


def _stops(name: str, value: Any) -> tuple[str, ...]:
    """Returns texts as they are, one text and None too."""
    stops = [value] if isinstance(value, str) and value else value or ()
    if not isinstance(stops, Iterable) or not all(isinstance(stop, str) for stop in stops):
        raise NeoError(f"{name} must be a text or a list of texts, not {brief(value)}.")
    return tuple(stops)


def check_filter(filter: str, review: str) -> None:
    """Raises NeoError where a review file has no filter."""
    if review and not filter:
        raise NeoError("filter_review has no effect without a filter; name one, or leave it out.")


@dataclasses.dataclass(frozen=True)
class TextOptions:
    """What a user says about texts, apart from how their tokens are chosen.

    Raises:
      NeoError: a value of another kind or out of its range, or samples that memory cannot hold.
    """

    max_new_tokens: int = number(64, least=1)  # tokens to write, at most
    # ends a text before this string; may be repeated
    stop: tuple[str, ...] = converted((), _stops)
    # texts for each prompt; sample i has the seed plus i, or is the i-th best beam
    num_samples: int = number(1, least=1)
    num_drafted: int = number(NUM_DRAFTED, least=1)  # tokens that a draft proposes at a time
    # texts that are written together; one that is done makes place
    batch_size: int = number(16, least=1)
    # a prompt that leaves no room in the context: refused, or cut to its newest tokens
    on_overflow: Overflow = choice("error", get_args(Overflow))
    # a file of words, one a line, before any of which a text ends; # begins a comment
    filter: str = ""
    filter_review: str = ""  # a file to which what the filter withholds is added, for people

    def __post_init__(self) -> None:
        check(self)
        check_filter(self.filter, self.filter_review)
        needed = self.num_samples * (_SAMPLE_BYTES + _TOKEN_BYTES * self.max_new_tokens)
        if needed > machine_bytes():
            raise NeoError(
                f"{self.num_samples} samples of a prompt, which are held until all are there, may "
                f"take {needed / 1e9:,.0f} GB of this machine's {machine_bytes() / 1e9:.0f}; take "
                "fewer at a time, each time with another seed."
            )


def read_filter(options: TextOptions) -> WordFilter | None:
    """Returns the filter that options name; raises as `read_word_filter`."""
    if not options.filter:
        return None
    return read_word_filter(options.filter, options.filter_review)


def names(kind: type) -> list[str]:
    """Returns the options that a class declares."""
    return [field.name for field in dataclasses.fields(kind)]


def pick(options: dict[str, Any], kind: type) -> dict[str, Any]:
    """Returns the options that a class declares, of those that are there."""
    return {name: options[name] for name in names(kind) if name in options}


_ELSEWHERE = {
    "do_sample": "texts are drawn unless temperature is 0, which is greedy",
    "max_length": "max_new_tokens counts the new tokens, without the prompt",
    "max_tokens": "here it is max_new_tokens",
    "min_length": "min_new_tokens counts the new tokens, without the prompt",
    "num_return_sequences": "here it is num_samples",
    "n": "here it is num_samples",
    "stop_strings": "here it is stop",
    "assistant_model": "here it is draft",
    "torch_dtype": "here it is dtype",
    "device": "models go to JAX's default device, or over a mesh, as in mesh='fsdp=-1'",
    "device_map": "here it is mesh, as in mesh='fsdp=-1' for all devices",
    "load_in_8bit": "here it is quantize='int8'",
    "pad_token_id": "leave it out: padding is never seen",
    "eos_token_id": "it is the model's own; stop takes texts to end at",
}
"""What other libraries call an option, and what there is here."""


def check_names(options: Iterable[str], known: Iterable[str]) -> None:
    """Raises NeoError for an option that does not exist; the message suggests one that does."""
    for name in options:
        if name not in known:
            if name in _ELSEWHERE:
                raise NeoError(f"unknown option '{name}': {_ELSEWHERE[name]}.")
            raise NeoError(f"unknown option '{name}'.{suggest(name, known)}")


def read_options(options: dict[str, Any]) -> tuple[SamplingOptions, dict[str, Any]]:
    """Sorts options by name.

    Returns:
      Those of sampling, and arguments of `LanguageModel.samples`.

    Raises:
      NeoError: an unknown option, or a value that is out of its range.
    """
    others = [*names(TextOptions), "draft"]
    others.remove("num_samples")
    check_names(options, [*names(SamplingOptions), *names(BeamOptions), *others])
    arguments = {name: options[name] for name in others if name in options}
    if beams := pick(options, BeamOptions):
        arguments["beams"] = BeamOptions(**beams)
    return SamplingOptions(**pick(options, SamplingOptions)), arguments


def check_together(
    sampling: Iterable[SamplingOptions], text: TextOptions, beams: BeamOptions, has_draft: bool
) -> None:
    """Checks that every option that says something other than its default has an effect.

    Raises:
      NeoError: one has none next to the others; the message names it.
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


def spread(
    sampling: SamplingOptions | Sequence[SamplingOptions], num_prompts: int
) -> Sequence[SamplingOptions]:
    """Returns the options of each prompt, of options for all of them or a list.

    Raises:
      NeoError: they are something else, or a list of another length.
    """
    several = [sampling] * num_prompts if isinstance(sampling, SamplingOptions) else sampling
    if not isinstance(several, Sequence) or not all(
        isinstance(options, SamplingOptions) for options in several
    ):
        raise NeoError(f"sampling must be SamplingOptions, or a list, not {brief(sampling)}.")
    if len(several) != num_prompts:
        raise NeoError(f"{len(several)} sampling options do not match {num_prompts} prompts.")
    return several


def reseeded(options: SamplingOptions, sample: int) -> SamplingOptions:
    """Returns the options of a prompt's sample of this index."""
    return dataclasses.replace(options, seed=(options.seed + sample) % 2**32)


def allowed(model: Neo, options: SamplingOptions) -> SamplingOptions:
    """Returns options as a model can follow them: the end of text alone is no bad word.

    Raises:
      NeoError: an id outside the vocabulary, or none that may be written.
    """
    config = model.config
    forced = (options.forced_bos_token_id, options.forced_eos_token_id)
    banned = (i for ids, _ in options.bans for i in ids)
    for i in (*forced, *banned, *(i for i, _ in options.logit_bias)):
        if i >= config.vocab_size:
            raise NeoError(
                f"token id {i} is not in the vocabulary, 0 to {config.vocab_size - 1}; leave it "
                "out of what is suppressed, forced or biased."
            )
    ends = [(i,) for i in config.eos_ids]
    words = tuple(word for word in options.bad_words_ids if word not in ends)
    options = dataclasses.replace(options, bad_words_ids=words)
    if len({ids for ids, _ in options.bans if len(ids) == 1}) >= config.vocab_size:
        raise NeoError("every token is suppressed, and none can be written; suppress fewer.")
    return options


def listed(prompts: Any) -> list[Any]:
    """Returns several prompts as a list; raises NeoError for one alone."""
    # Texts are sequences too, of characters.
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
        raise NeoError(
            f"this takes several, not {brief(prompts)}: give a list of prompts, as in ['one text']."
        )
    return list(prompts)
