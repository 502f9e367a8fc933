"""Answers of /v1/completions: texts, and the log p of tokens in OpenAI's older form."""

import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from neo_jax.serving.jobs import PromptFound, Token
from neo_jax.serving.protocol import CompletionBody
from neo_jax.serving.replies import Collected, Written, aside, collect, finite, head, usage
from neo_jax.serving.requests import Prepared, completion_jobs
from neo_jax.serving.service import Service
from neo_jax.serving.token_text import Offsets, TokenTexts, leading


async def complete(
    service: Service, body: CompletionBody
) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
    """Returns the answer, or the events of a stream.

    Raises:
      ApiError: as `completion_jobs` and `Service.run`; where a stream is wanted, the latter when it
        begins.
    """
    name = service.name(body.model)
    work = await aside(sum(map(len, body.prompt)), completion_jobs, service, body)
    answer = head("cmpl", "text_completion", name)
    if body.stream:
        return _stream(service, body, work, answer)
    needed = [job for job in work.jobs if job.options or job.prompt_alternatives is not None]
    found = await collect(service, work.jobs) if needed else []
    return {**answer, **await aside(work.prompt_tokens, _whole, service, body, work, found)}


def _whole(
    service: Service, body: CompletionBody, work: Prepared, found: Sequence[Collected]
) -> dict[str, Any]:
    """Returns what became of the prompts."""
    choices: list[dict[str, Any]] = []
    new_tokens = 0
    for place, prompt in enumerate(work.texts):
        read = found[place].prompt if found else None
        texts = found[place].texts if found else []
        new_tokens += sum(len(text.tokens) for text in texts)
        best = sorted(texts, key=lambda text: -text.mean_logprob) if len(texts) > body.n else texts
        for text in best[: body.n] or [Written(finish_reason="length")] * body.n:
            choice = Choice(service, body, len(choices), prompt, read)
            made = choice.make(text.text, text.tokens, text.finish_reason)
            if body.prompt_logprobs is not None and read is not None:
                shown = prompt_logprobs(service.texts, read.tokens, body.prompt_logprobs)
                made["prompt_logprobs"] = shown
            choices.append(made)
    return {"choices": choices, "usage": usage(work.prompt_tokens, new_tokens)}


async def _stream(
    service: Service, body: CompletionBody, work: Prepared, answer: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields an event for each new token of a text."""
    new_tokens, shown = 0, body.streamed
    choices = [
        [Choice(service, body, place * body.n + sample, prompt) for sample in range(body.n)]
        for place, prompt in enumerate(work.texts)
    ]

    def made(choice: dict[str, Any]) -> dict[str, Any]:
        numbers = usage(work.prompt_tokens, new_tokens) if shown.continuous_usage_stats else None
        more = {"usage": numbers} if shown.include_usage or numbers else {}
        return {**answer, "choices": [choice], **more}

    is_read_only = not any(job.options for job in work.jobs)
    if is_read_only and body.logprobs is None:  # the echo alone
        for choice in (each for many in choices for each in many):
            yield made(choice.make("", [], "length"))
    else:
        async with contextlib.aclosing(service.run(work.jobs)) as found:
            async for index, new in found:
                if isinstance(new, PromptFound):
                    for choice in choices[index]:
                        choice.read = new
                        if is_read_only:
                            yield made(choice.make("", [], "length"))
                    continue
                new_tokens += len(new.tokens)
                choice = choices[index][new.sample]
                yield made(choice.make(new.text, new.tokens, new.finish_reason))
    if shown.include_usage:
        yield {**answer, "choices": [], "usage": usage(work.prompt_tokens, new_tokens)}


class Choice:
    """A text of an answer, all at once or in pieces."""

    def __init__(
        self,
        service: Service,
        body: CompletionBody,
        index: int,
        prompt: str,
        read: PromptFound | None = None,
    ) -> None:
        """Begins it: with its prompt, where that is echoed."""
        self.read = read  # what was found of the prompt
        self._texts, self._index, self._num = service.texts, index, body.logprobs
        self._echo = prompt if body.echo else ""
        self._echoes = body.echo
        self._offsets: Offsets | None = None

    def make(self, text: str, tokens: Sequence[Token], finish_reason: str | None) -> dict[str, Any]:
        """Returns a piece of it, or all."""
        logprobs = None
        if self._num is not None:
            before = self.read.tokens if self.read and self._echoes else []
            if self._offsets is None:
                shown = [self._texts[token.id] for token in before]
                extra = leading(shown, self._echo) if before else -len(self._echo)
                self._offsets = Offsets(-extra)
            logprobs = legacy(self._texts, [*before, *tokens], self._num, self._offsets)
        text, self._echo, self._echoes = self._echo + text, "", False
        return {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


def legacy(
    texts: TokenTexts, tokens: Sequence[Token], num: int, offsets: Offsets
) -> dict[str, list[Any]]:
    """Returns the log p of tokens in the form of completions.

    Args:
      texts: how tokens are shown.
      tokens: of a text.
      num: the likeliest tokens that are shown for each; the text's own is always among them.
      offsets: where the tokens begin.
    """
    found: dict[str, list[Any]] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
    }  # fmt: skip
    for token in tokens:
        found["tokens"].append(texts[token.id].text)
        found["text_offset"].append(offsets.push(texts[token.id]))
        if token.logprob is None:  # nothing comes before it
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        # Its own first: clients compare it with the largest, for which it must be the same number.
        others = [(id, finite(p)) for id, p in token.alternatives[:num] if id != token.id]
        own = (token.id, finite(token.logprob))
        found["token_logprobs"].append(own[1])
        found["top_logprobs"].append(texts.named([own, *others]))
    return found


def prompt_logprobs(
    texts: TokenTexts, tokens: Sequence[Token], num: int
) -> list[dict[str, Any] | None]:
    """Returns the log p of a prompt's tokens in vLLM's form: by id, with a rank if it is known."""
    found: list[dict[str, Any] | None] = []
    for token in tokens:
        if token.logprob is None:
            found.append(None)
            continue
        ranks = {id: rank for rank, (id, _) in enumerate(token.alternatives, 1)}
        entries = {token.id: token.logprob, **dict(token.alternatives[:num])}
        entries[token.id] = token.logprob
        found.append(
            {
                str(id): {
                    "logprob": finite(logprob),
                    "rank": ranks.get(id),
                    "decoded_token": texts[id].text,
                }
                for id, logprob in entries.items()
            }
        )
    return found
