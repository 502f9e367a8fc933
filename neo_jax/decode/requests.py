"""What clients of the scheduler submit, and what they get back."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from neo_jax.decode.engine import Completion
from neo_jax.decode.options import SamplingOptions
from neo_jax.decode.pooling import Pooling

StopCheck = Callable[[list[int]], int | None]
"""Takes the new ids of a text since the last call; returns how many of all to keep, to stop it."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, once for each of several options; or only to be looked at."""

    ids: Sequence[int]
    max_new_tokens: int
    options: Sequence[SamplingOptions]
    stop_checks: Sequence[StopCheck] = ()  # one for each of the options, or none
    stream: bool = False  # whether every step writes one token, and an event reports it
    num_alternatives: int = 0  # likeliest tokens that an event has for each new one, of a stream
    # Where prompts are read by chunks: what is wanted of this one.
    prompt_logprobs: bool = False
    prompt_pool: Pooling = ""  # how its hidden states become one vector


class PromptRead(NamedTuple):
    """A prompt has been read by chunks."""

    request: int  # what `submit` returned
    logprobs: np.ndarray | None  # float32 [T - 1], log p of each token after the first, if wanted
    ids: np.ndarray | None  # int32 [T - 1, K], the likeliest tokens in their place
    likeliest: np.ndarray | None  # float32 [T - 1, K], and the log p of these
    pooled: np.ndarray | None  # float32 [D], of the hidden states after ln_f, if wanted


class Event(NamedTuple):
    """What a step did to a text.

    A text of a request that streams, or has stop checks, has one at each step; others have one,
    when they are finished.
    """

    request: int  # what `submit` returned
    sample: int  # the index of its options
    ids: list[int]  # new tokens since the text's last event
    logprobs: list[float]
    completion: Completion | None  # the whole text, once it is finished; a stop check may cut it
    alternatives: list[list[tuple[int, float]]]  # for each new token: ids and their log p


@dataclasses.dataclass
class Text:
    """A sample that is being generated, or will be when its prompt has been read."""

    id: int  # of its request
    request: Request
    sample: int
    source: int  # its prompt's row among those that were read together
    reported: int = 0  # new ids that the stop check and events have had

    @property
    def is_watched(self) -> bool:
        """Whether every step is looked at."""
        return self.request.stream or bool(self.request.stop_checks)

    @property
    def length(self) -> int:
        """Tokens that it may have in the end."""
        return len(self.request.ids) + self.request.max_new_tokens

    @property
    def options(self) -> SamplingOptions:
        """How its tokens are chosen."""
        return self.request.options[self.sample]
