"""The bodies of requests: OpenAI's fields, and under vLLM's names those that OpenAI has not."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError, brief
from neo_jax.serving.bodies import (
    MOST_PROMPTS,
    MOST_TOKENS,
    Body,
    Lacking,
    flag,
    given,
    ids,
    listed,
    prompts,
    read_fields,
    real,
    text,
    whole,
)
from neo_jax.serving.errors import invalid

MOST_STOPS = 16
_IDS = 2**31 - 1
_NO_TOOLS = Lacking("the model calls no functions", ([], "none", "auto", False, True))
_PLAIN_ONLY = Lacking("answers are plain text", ({"type": "text"},))
_NOT_KEPT = Lacking("nothing is stored", (False,))


def _sampling(name: str, value: Any) -> float:
    """Is the rule of a number whose range `SamplingOptions` declares."""
    said: dict[str, Any] = {name: real(name, value)}
    return getattr(SamplingOptions(**said), name)


def _top_k(name: str, value: Any) -> int:
    return max(whole(-1, _IDS)(name, value), 0)


def _seed(name: str, value: Any) -> int:
    return whole(-(2**63), 2**63 - 1)(name, value) % 2**32


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else listed(name, value, MOST_STOPS)
    for place, stop in enumerate(stops):
        if not text(f"{name}[{place}]", stop):
            raise NeoError(f"{name} has an empty text, which would stop every text at once.")
    return tuple(stops)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise NeoError(f'{name} must map token ids to numbers, as in {{"50256": -100}}.')
    if len(value) > MOST_BIASES:
        raise NeoError(f"{name} must have at most {MOST_BIASES} entries, not {len(value)}.")
    pairs = []
    for token, bias in value.items():
        if not re.fullmatch("[0-9]{1,10}", token):
            raise NeoError(f"{name}: {brief(token)} is not a token id.")
        if not -100 <= real(f"{name} of id {token}", bias) <= 100:
            raise NeoError(f"{name} of id {token} must lie between -100 and 100, not be {bias}.")
        pairs.append((int(token), float(bias)))
    return tuple(pairs)


MOST_BIASES = 1024
"""Entries of `logit_bias`, for which the engine has room, and of `stop_token_ids`."""


def truncation(name: str, value: Any) -> int:
    """Is the rule of how many tokens of a prompt are kept."""
    if whole(-1, _IDS)(name, value) == 0:
        raise NeoError(f"{name} must be at least 1, or -1 for as many as fit, not 0.")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamOptions(Body):
    """What a stream has next to its text."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        "include_obfuscation": Lacking("chunks are not padded", (False,))
    }
    include_usage: bool = given(flag, False)  # a last chunk with the number of tokens
    continuous_usage_stats: bool = given(flag, False)  # and every chunk with those so far


def _stream_options(name: str, value: Any) -> StreamOptions:
    return StreamOptions(**read_fields(StreamOptions, value, name, f"{name}."))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(Body):
    """A request to a model; none is the one that is served."""

    ignored: ClassVar[frozenset[str]] = frozenset(
        """user metadata safety_identifier prompt_cache_key prompt_cache_retention request_id
        """.split()
    )
    model: str | None = given(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Model):
    """What requests for new text have in common."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        "response_format": _PLAIN_ONLY,
        "guided_json": _PLAIN_ONLY, "guided_regex": _PLAIN_ONLY, "guided_choice": _PLAIN_ONLY,
        "guided_grammar": _PLAIN_ONLY, "structured_outputs": _PLAIN_ONLY,
        "service_tier": Lacking("all requests wait in one queue", ("auto", "default")),
        "priority": Lacking("all requests wait in one queue", (0,)),
        "use_beam_search": Lacking("texts are sampled", (False,)),
        "length_penalty": Lacking("texts are sampled", (1,)),
        "allowed_token_ids": Lacking("logit_bias makes ids likelier", ([],)),
        "bad_words": Lacking("logit_bias makes ids unlikelier", ([],)),
        "include_stop_str_in_output": Lacking("texts end before what stops them", (False,)),
        "skip_special_tokens": Lacking("special tokens have no text", (True,)),
        "spaces_between_special_tokens": Lacking("special tokens have no text", (True, False)),
        "return_tokens_as_token_ids": Lacking("/tokenize gives ids", (False,)),
        "store": _NOT_KEPT,
    }  # fmt: skip
    n: int = given(whole(1, 128), 1)  # texts for each prompt
    stream: bool = given(flag, False)
    stream_options: StreamOptions | None = given(_stream_options)  # noqa: RUF009
    stop: tuple[str, ...] | None = given(_stop)
    stop_token_ids: tuple[int, ...] = given(ids(MOST_BIASES), ())
    seed: int | None = given(_seed)  # None draws one
    temperature: float | None = given(_sampling)
    top_p: float | None = given(_sampling)
    top_k: int | None = given(_top_k)
    min_p: float | None = given(_sampling)
    presence_penalty: float | None = given(_sampling)
    frequency_penalty: float | None = given(_sampling)
    repetition_penalty: float | None = given(_sampling)
    logit_bias: tuple[tuple[int, float], ...] | None = given(_logit_bias)
    min_tokens: int | None = given(whole(0, _IDS))
    ignore_eos: bool | None = given(flag)
    truncate_prompt_tokens: int | None = given(truncation)

    def __post_init__(self) -> None:
        if self.stream_options and not self.stream:
            raise invalid("stream_options need stream: true.", "stream_options")

    @property
    def streamed(self) -> StreamOptions:
        """What a stream has next to its text."""
        return self.stream_options or StreamOptions()

    @property
    def limit(self) -> int | None:
        """The most new tokens, where the request says it."""
        raise NotImplementedError

    def check_lengths(self) -> None:
        """Raises ApiError where a text must be longer than it may be."""
        if self.limit is not None and (self.min_tokens or 0) > self.limit:
            raise invalid(
                f"min_tokens {self.min_tokens} exceed max_tokens {self.limit}; lower one of them.",
                "min_tokens",
            )

    @property
    def sampling(self) -> dict[str, Any]:
        """What the request says of how tokens are chosen, as `SamplingOptions` call it."""
        names = (
            *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
            *("repetition_penalty", "logit_bias", "ignore_eos", "seed"),
        )
        said = {name: getattr(self, name) for name in names} | {"min_new_tokens": self.min_tokens}
        return {name: value for name, value in said.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionBody(Writing):
    """POST /v1/completions."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        **Writing.lacking,
        "suffix": Lacking("the model writes from left to right", ("",)),
        "add_special_tokens": Lacking("give ids for a prompt without them", (True,)),
    }
    prompt: tuple[str | list[int], ...] = given(prompts, ("",))  # none begins a text
    max_tokens: int | None = given(whole(0, _IDS))
    best_of: int | None = given(whole(1, 128))
    echo: bool = given(flag, False)
    logprobs: int | None = given(whole(0, _IDS))
    prompt_logprobs: int | None = given(whole(0, _IDS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        if self.best_of is not None and self.best_of < self.n:
            raise invalid(f"best_of {self.best_of} must be at least n, {self.n}.", "best_of")
        if self.stream and self.num_samples > self.n:
            raise invalid("best_of cannot be streamed; leave it out, or stream.", "best_of")
        if self.stream and self.prompt_logprobs is not None:
            raise invalid(
                "prompt_logprobs cannot be streamed; leave it out, or take echo with logprobs.",
                "prompt_logprobs",
            )
        if self.limit == 0 and not self.echo and self.prompt_logprobs is None:
            raise invalid(
                "max_tokens must be at least 1; 0 is for echo and prompt_logprobs.", "max_tokens"
            )
        if len(self.prompt) * self.num_samples > MOST_PROMPTS:
            raise invalid(
                f"{len(self.prompt)} prompts times {self.num_samples} texts are more than "
                f"{MOST_PROMPTS} in one request; send several.",
                "n",
            )

    @property
    def limit(self) -> int | None:
        """The most new tokens, where the request says it."""
        return self.max_tokens

    @property
    def num_samples(self) -> int:
        """Texts that are written for each prompt."""
        return self.n if self.best_of is None else self.best_of


def _role(name: str, value: Any) -> str:
    if value in ("system", "user", "assistant"):
        return value
    raise NeoError(f"{name} must be 'system', 'user' or 'assistant', not {brief(value)}.")


def _content(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise NeoError(f"{name} must be a text, or a list of parts, not {brief(value)}.")
    for place, part in enumerate(listed(name, value, MOST_PROMPTS)):
        label = f"{name}[{place}]"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise NeoError(f'{label} must be {{"type": "text", "text": ...}}, not {brief(part)}.')
        text(f"{label}.text", part.get("text"))
        if more := part.keys() - {"type", "text"}:
            raise NeoError(f"{label} has the unknown field {brief(min(more))}.")
    return "\n".join(part["text"] for part in value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Message(Body):
    """What one side of a conversation says."""

    ignored: ClassVar[frozenset[str]] = frozenset({"name"})
    lacking: ClassVar[Mapping[str, Lacking]] = {
        "tool_calls": _NO_TOOLS, "tool_call_id": _NO_TOOLS, "function_call": _NO_TOOLS,
        "annotations": Lacking("they are not read", ([],)),
        "refusal": Lacking("put it into content"),
        "audio": Lacking("it is a model of text"),
    }  # fmt: skip
    role: str = given(_role, dataclasses.MISSING)
    content: str = given(_content, dataclasses.MISSING)


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    found = []
    for place, each in enumerate(listed(name, value, MOST_PROMPTS)):
        label = f"{name}[{place}]"
        found.append(Message(**read_fields(Message, each, label, f"{label}.")))
    if not found:
        raise NeoError(
            f'{name} is empty; give a message, as in {{"role": "user", "content": ...}}.'
        )
    return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversation(Model):
    """Messages, and how they become a prompt."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        "chat_template": Lacking("the server's own is taken: --chat-template"),
        "chat_template_kwargs": Lacking("templates take no arguments", ({},)),
        "documents": Lacking("put them into messages", ([],)),
    }
    messages: tuple[Message, ...] = given(_messages, ())
    add_generation_prompt: bool | None = given(flag)  # None: unless the last message goes on
    continue_final_message: bool = given(flag, False)

    def check_messages(self) -> None:
        """Raises ApiError where it is not clear how the prompt ends."""
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "add_generation_prompt and continue_final_message exclude each other.",
                "continue_final_message",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatBody(Conversation, Writing):
    """POST /v1/chat/completions."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        **Writing.lacking, **Conversation.lacking,
        "tools": _NO_TOOLS, "tool_choice": _NO_TOOLS, "functions": _NO_TOOLS,
        "function_call": _NO_TOOLS, "parallel_tool_calls": _NO_TOOLS,
        "modalities": Lacking("it is a model of text", (["text"],)),
        "audio": Lacking("it is a model of text"),
        "moderation": Lacking("nothing is moderated"),
        "prediction": Lacking("nothing is predicted"),
        "reasoning_effort": Lacking("the model does not reason", ("none",)),
        "verbosity": Lacking("max_tokens bounds an answer", ("medium",)),
        "web_search_options": Lacking("nothing is searched"),
        "prompt_cache_options": Lacking("prompts are not cached"),
        "echo": Lacking("/v1/completions has it", (False,)),
        "add_special_tokens": Lacking("the template puts them", (False,)),
        "best_of": Lacking("/v1/completions has it", (1,)),
        "suffix": Lacking("the model writes from left to right", ("",)),
        "prompt_logprobs": Lacking("/v1/completions has it"),
    }  # fmt: skip
    messages: tuple[Message, ...] = given(_messages, dataclasses.MISSING)
    max_tokens: int | None = given(whole(1, _IDS))
    max_completion_tokens: int | None = given(whole(1, _IDS))  # OpenAI's newer name of it
    logprobs: bool = given(flag, False)
    top_logprobs: int = given(whole(0, _IDS), 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_lengths()
        self.check_messages()
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs need logprobs: true.", "top_logprobs")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise invalid(
                "max_tokens and max_completion_tokens differ; give one of them.", "max_tokens"
            )

    @property
    def limit(self) -> int | None:
        """The most new tokens, where the request says it."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizeBody(Conversation):
    """POST /tokenize: a text, or messages."""

    prompt: str | None = given(text)
    add_special_tokens: bool | None = given(flag)  # None: to a text, and not to messages
    return_token_strs: bool = given(flag, False)

    def __post_init__(self) -> None:
        self.check_messages()
        if (self.prompt is None) == (not self.messages):
            raise invalid("give either prompt or messages.", "prompt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetokenizeBody(Model):
    """POST /detokenize."""

    tokens: tuple[int, ...] = given(ids(MOST_TOKENS), dataclasses.MISSING)
