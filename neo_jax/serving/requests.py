"""From the body of a request to jobs of the engine.

Long texts, and templates, take their time: threads call these functions, next to the loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from neo_jax.decode.engine import check_tokens
from neo_jax.decode.options import SamplingOptions
from neo_jax.decode.pooling import Pooling
from neo_jax.errors import NeoError
from neo_jax.serving.errors import ApiError, invalid
from neo_jax.serving.jobs import Job
from neo_jax.serving.protocol import (
    ChatBody,
    CompletionBody,
    Conversation,
    TokenizeBody,
    Writing,
)
from neo_jax.serving.reading_bodies import ClassifyBody, EmbeddingBody
from neo_jax.serving.service import Service
from neo_jax.text.options import allowed, pick, reseeded

_MAX_TOKENS = 16  # where neither the request nor the checkpoint says: OpenAI's
_OPENAI = {"temperature": 1.0, "top_p": 1.0}


class Prepared(NamedTuple):
    """The prompts of a request, and what the engine does with them."""

    texts: list[str]  # of the prompts
    jobs: list[Job]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts."""
        return sum(len(job.ids) for job in self.jobs)


def completion_jobs(service: Service, body: CompletionBody) -> Prepared:
    """Prepares /v1/completions.

    Raises:
      ApiError: a prompt that does not fit, or options that this model cannot follow.
    """
    _check_writes(service)
    _check_prompts(service, len(body.prompt), "prompt")
    _check_alternatives(service, body.logprobs, "logprobs")
    _check_alternatives(service, body.prompt_logprobs, "prompt_logprobs")
    filled = _filled(service, body)
    default = filled.pop("max_new_tokens", _MAX_TOKENS)
    stop = _stop(filled)
    options = _options(service, body, filled, body.num_samples)
    shown = [body.prompt_logprobs, body.logprobs if body.echo else None]
    alternatives = max((number for number in shown if number is not None), default=None)
    texts: list[str] = []
    jobs: list[Job] = []
    for place, prompt in enumerate(body.prompt):
        param = "prompt" if len(body.prompt) == 1 else f"prompt[{place}]"
        ids = encode(service, prompt, param)
        kept, new = _fit(service, ids, body, default, param)
        whole = isinstance(prompt, str) and len(kept) == len(ids)
        texts.append(str(prompt) if whole else service.tokenizer.decode(kept))
        jobs.append(
            Job(
                kept,
                new,
                options if new else (),
                stop,
                body.stop_token_ids,
                body.logprobs or 0,
                alternatives,
            )
        )
    return Prepared(texts, jobs)


def chat_jobs(service: Service, body: ChatBody) -> Prepared:
    """Prepares /v1/chat/completions; raises as `completion_jobs`."""
    _check_writes(service)
    _check_alternatives(service, body.top_logprobs, "top_logprobs")
    text = render(service, body)
    filled = _filled(service, body)
    stop = _stop(filled)
    if service.template:
        stop = (*stop, *(each for each in service.template.stop if each not in stop))
    options = _options(service, body, filled, body.n)
    ids = encode(service, text, "messages", special=False)
    default = filled.pop("max_new_tokens", service.context)
    ids, new = _fit(service, ids, body, default, "messages")
    job = Job(ids, new, options, stop, body.stop_token_ids, body.top_logprobs)
    return Prepared([text], [job])


def embedding_jobs(service: Service, body: EmbeddingBody) -> Prepared:
    """Prepares /v1/embeddings; raises as `completion_jobs`."""
    pooling: Any = body.pooling  # its rule has checked it
    return _read_only(service, body, pooling)


def classify_jobs(service: Service, body: ClassifyBody) -> Prepared:
    """Prepares /classify; raises as `completion_jobs`, and where the model is no classifier."""
    if service.lm.config.head.kind != "score":
        raise invalid("the model is no classifier of texts; serve one: docs/classify.md.", "model")
    return _read_only(service, body, "last")


def _read_only(service: Service, body: EmbeddingBody | ClassifyBody, pool: Pooling) -> Prepared:
    """Prepares texts that are read and not continued."""
    _check_prompts(service, len(body.input), "input")
    jobs = []
    for place, prompt in enumerate(body.input):
        param = "input" if len(body.input) == 1 else f"input[{place}]"
        if prompt in ("", []):
            raise invalid(f"{param} is empty; give at least one token.", param)
        ids = encode(service, prompt, param)
        ids = _truncated(ids, body.truncate_prompt_tokens, service.context)
        if len(ids) > service.context:
            raise _too_long(service, len(ids), 0, param)
        _check_ids(service, ids, param)
        jobs.append(Job(ids, pool=pool))
    return Prepared([], jobs)


def encode(
    service: Service, prompt: str | list[int], param: str, special: bool = True
) -> list[int]:
    """Returns the ids of a prompt; of "" the end of text alone, behind which a text begins.

    Raises:
      ApiError: no tokens, or a text that is not Unicode.
    """
    lm = service.lm
    try:
        if not isinstance(prompt, str):
            return lm.encode(prompt)
        if not special:
            return lm.encode(prompt, False)
        return lm.prompt_ids(prompt)
    except NeoError as error:
        raise invalid(f"{param}: {error}", param) from error


def tokenize(service: Service, body: TokenizeBody) -> list[int]:
    """Returns the ids of /tokenize, also of a text that has none; raises as `encode`."""
    special = body.add_special_tokens
    text, param = body.prompt, "prompt"
    if text is None:
        text, param = render(service, body), "messages"
    special = body.prompt is not None if special is None else special
    try:
        return service.tokenizer.encode(text, special)
    except NeoError as error:
        raise invalid(f"{param}: {error}", param) from error


def render(service: Service, body: Conversation) -> str:
    """Returns the text of a conversation.

    Raises:
      ApiError: there is no template, or it takes no such messages.
    """
    if service.template is None:
        raise ApiError(
            400,
            "the model has no chat template; take /v1/completions, or start the server with "
            "--chat-template plain or the name of a file.",
            "messages",
            "no_chat_template",
        )
    messages = [{"role": each.role, "content": each.content} for each in body.messages]
    begins = body.add_generation_prompt
    begins = not body.continue_final_message if begins is None else begins
    try:
        return service.template.render(messages, begins, body.continue_final_message)
    except NeoError as error:
        raise invalid(str(error), "messages") from error


def _filled(service: Service, body: Writing) -> dict[str, Any]:
    """Returns what the request says, then the checkpoint, then OpenAI."""
    said = body.sampling | ({} if body.stop is None else {"stop": body.stop})
    filled = service.lm.defaults.fill(said | {"num_beams": 1})
    return _OPENAI | filled


def _stop(filled: dict[str, Any]) -> tuple[str, ...]:
    stop = filled.get("stop", ())
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _options(
    service: Service, body: Writing, filled: dict[str, Any], count: int
) -> Sequence[SamplingOptions]:
    """Returns the options of each sample of a prompt."""
    size = service.lm.config.vocab_size
    for param, ids in (
        ("logit_bias", [token for token, _ in body.logit_bias or ()]),
        ("stop_token_ids", body.stop_token_ids),
    ):
        for token in ids:
            if token >= size:
                raise invalid(f"{param}: {token} is no token id; they end at {size - 1}.", param)
    fields = pick(filled, SamplingOptions)
    try:
        options = SamplingOptions(**{"seed": None, **fields})
        options = allowed(service.lm.model, options)
        return [reseeded(options, sample) for sample in range(count)]
    except NeoError as error:
        raise invalid(str(error)) from error


def _fit(
    service: Service, ids: list[int], body: Writing, default: int, param: str
) -> tuple[list[int], int]:
    """Returns the tokens of a prompt that are read, and the most that follow.

    Raises:
      ApiError: they do not fit the context, or a token is not in the vocabulary.
    """
    context, limit = service.context, body.limit
    least = max(1, body.min_tokens or 0) if limit is None else limit
    ids = _truncated(ids, body.truncate_prompt_tokens, context - least)
    if len(ids) + least > context:
        raise _too_long(service, len(ids), least, param)
    _check_ids(service, ids, param)
    room = context - len(ids)
    return ids, min(max(default, least), room) if limit is None else limit


def _truncated(ids: list[int], wanted: int | None, room: int) -> list[int]:
    """Returns the newest tokens; -1 keeps as many as fit."""
    if wanted is None:
        return ids
    return ids[-max(room, 1) :] if wanted < 0 else ids[-wanted:]


def _check_ids(service: Service, ids: list[int], param: str) -> None:
    try:
        check_tokens(service.lm.model, ids)
    except NeoError as error:
        raise invalid(f"{param}: {error}", param) from error


def _too_long(service: Service, num_tokens: int, new: int, param: str) -> ApiError:
    more = f", and at least {new} must follow" if new else ""
    room = max(service.context - num_tokens, 0)
    fewer = f", or ask for at most {room} new tokens" if new and room else ""
    return invalid(
        f"{param} has {num_tokens} tokens{more}: the context is {service.context}; shorten the "
        f"text{fewer}.",
        param,
        "context_length_exceeded",
    )


def _check_prompts(service: Service, count: int, param: str) -> None:
    if service.max_prompts and count > service.max_prompts:
        raise invalid(
            f"{param} has {count} entries, more than the {service.max_prompts} that may wait at a "
            "time (--max-queued-requests); send several requests.",
            param,
        )


def _check_writes(service: Service) -> None:
    try:
        service.lm.config.head.check_writes()
    except NeoError as error:
        raise invalid(f"{error} (/classify)", "model") from error


def _check_alternatives(service: Service, count: int | None, param: str) -> None:
    if count is not None and count > service.max_logprobs:
        raise invalid(
            f"{param} must be at most {service.max_logprobs} (--max-logprobs), not {count}.", param
        )
