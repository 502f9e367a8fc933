"""What is served, and how much of it a request may have."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Sequence

from neo_jax.errors import NeoError, brief
from neo_jax.model.soft_prompt import text_context
from neo_jax.serving.engine import Engine
from neo_jax.serving.errors import ApiError, busy, invalid
from neo_jax.serving.jobs import Busy, Delta, Job, PromptFound
from neo_jax.serving.metrics import Metrics
from neo_jax.serving.templates import Template
from neo_jax.serving.token_text import TokenTexts
from neo_jax.text.language_model import LanguageModel
from neo_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Service:
    """A model, its engine, and the limits of requests."""

    lm: LanguageModel
    tokenizer: Tokenizer  # of the model
    engine: Engine
    metrics: Metrics
    names: tuple[str, ...]  # of the model; answers have the first where a request has none
    template: Template | None = None  # of conversations
    max_logprobs: int = 20  # likeliest tokens that a request may ask for
    max_prompts: int = 0  # of a request; 0 is off
    request_timeout: float = 0.0  # seconds; 0 is off
    api_keys: tuple[str, ...] = ()  # any of them opens; none lets everybody in
    version: str = ""
    texts: TokenTexts = dataclasses.field(init=False)  # how tokens are shown

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", TokenTexts(self.tokenizer))

    @property
    def context(self) -> int:
        """Tokens that the model reads, prompt and new ones."""
        return text_context(self.lm.model)

    def name(self, called: str | None) -> str:
        """Returns the name of the model in an answer to a request that calls it so.

        Raises:
          ApiError: it has no such name.
        """
        if called is None or called in self.names:
            return called or self.names[0]
        known = ", ".join(self.names)
        message = f"the model {brief(called)} does not exist; this server has {known}."
        raise ApiError(404, message, "model", "model_not_found")

    async def run(
        self, jobs: Sequence[Job]
    ) -> AsyncGenerator[tuple[int, PromptFound | Delta], None]:
        """Yields what `Engine.run` does; at the deadline of a request its texts end with "abort".

        Raises:
          ApiError: a job that cannot be done, a full queue, or a deadline that came too early.
        """
        writing = {(i, sample) for i, job in enumerate(jobs) for sample in range(len(job.options))}
        reading = {i for i, job in enumerate(jobs) if job.prompt_alternatives is not None}
        reading |= {i for i, job in enumerate(jobs) if job.pool}
        loop, begun = asyncio.get_running_loop(), False
        deadline = loop.time() + self.request_timeout if self.request_timeout else None
        async with contextlib.aclosing(self.engine.run(jobs)) as found:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        new = await anext(found, None)
                except TimeoutError:
                    break
                except Busy as error:
                    raise busy(str(error)) from error
                except NeoError as error:
                    raise invalid(str(error)) from error
                if new is None:
                    return
                begun = True
                index, each = new
                if isinstance(each, PromptFound):
                    reading.discard(index)
                elif each.finish_reason:
                    writing.discard((index, each.sample))
                yield index, each
        if reading or not begun:
            raise busy(
                f"the request was not done in {self.request_timeout:g} s (--request-timeout)."
            )
        for index, sample in sorted(writing):
            yield index, Delta(sample, "", [], "abort")
