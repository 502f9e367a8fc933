"""Answers of /v1/chat/completions: messages, and the log p of tokens with their bytes."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from neo_jax.serving.jobs import PromptFound, Token
from neo_jax.serving.protocol import ChatBody
from neo_jax.serving.replies import collect, finite, head, usage
from neo_jax.serving.requests import Prepared, chat_jobs
from neo_jax.serving.service import Service
from neo_jax.serving.token_text import TokenTexts


async def chat(
    service: Service, body: ChatBody
) -> dict[str, Any] | AsyncGenerator[dict[str, Any], None]:
    """Returns the answer, or the events of a stream; raises as `completions.complete`."""
    name = service.name(body.model)
    work = await asyncio.to_thread(chat_jobs, service, body)
    if body.stream:
        return _stream(service, body, work, head("chatcmpl", "chat.completion.chunk", name))
    (found,) = await collect(service, work.jobs)
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text.text, "refusal": None},
            "logprobs": _logprobs(service.texts, body, text.tokens),
            "finish_reason": text.finish_reason,
        }
        for index, text in enumerate(found.texts)
    ]
    numbers = usage(work.prompt_tokens, sum(len(text.tokens) for text in found.texts))
    return {**head("chatcmpl", "chat.completion", name), "choices": choices, "usage": numbers}


async def _stream(
    service: Service, body: ChatBody, work: Prepared, answer: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """Yields an event for each new token of a text; its first has the role."""
    new_tokens, shown, begun = 0, body.streamed, set()
    async with contextlib.aclosing(service.run(work.jobs)) as found:
        async for _, new in found:
            if isinstance(new, PromptFound):
                continue
            new_tokens += len(new.tokens)
            delta = {} if new.sample in begun else {"role": "assistant", "content": ""}
            begun.add(new.sample)
            if new.text:
                delta["content"] = new.text
            choice = {
                "index": new.sample,
                "delta": delta,
                "logprobs": _logprobs(service.texts, body, new.tokens),
                "finish_reason": new.finish_reason,
            }
            numbers = usage(work.prompt_tokens, new_tokens)
            numbers_now = numbers if shown.continuous_usage_stats else None
            more = {"usage": numbers_now} if shown.include_usage or numbers_now else {}
            yield {**answer, "choices": [choice], **more}
    if shown.include_usage:
        yield {**answer, "choices": [], "usage": usage(work.prompt_tokens, new_tokens)}


def _logprobs(
    texts: TokenTexts, body: ChatBody, tokens: Sequence[Token]
) -> dict[str, list[Any]] | None:
    """Returns the log p of tokens, if they are wanted."""
    if not body.logprobs:
        return None
    return {
        "content": [
            {
                **_shown(texts, token.id, token.logprob or 0.0),
                "top_logprobs": [
                    _shown(texts, id, logprob)
                    for id, logprob in token.alternatives[: body.top_logprobs]
                ],
            }
            for token in tokens
        ]
    }


def _shown(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    """Returns a token with its log p; special tokens have no bytes."""
    text, found = texts[token]
    return {"token": text, "logprob": finite(logprob), "bytes": [*found] or None}
