"""The bodies of requests whose texts are read, and not continued: embeddings, labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from neo_jax.decode.pooling import POOLINGS
from neo_jax.errors import NeoError, brief
from neo_jax.serving.bodies import Lacking, flag, given, prompts
from neo_jax.serving.protocol import Model, truncation


def _encoding(name: str, value: Any) -> str:
    if value in ("float", "base64"):
        return value
    raise NeoError(f"{name} must be 'float' or 'base64', not {brief(value)}.")


def _pooling(name: str, value: Any) -> str:
    if value in POOLINGS:
        return value
    raise NeoError(f"{name} must be one of {', '.join(POOLINGS)}, not {brief(value)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingBody(Model):
    """What requests that are only read have in common."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        "add_special_tokens": Lacking("give ids for a text without them", (True,)),
        "priority": Lacking("all requests wait in one queue", (0,)),
    }
    input: tuple[str | list[int], ...] = given(prompts, dataclasses.MISSING)
    truncate_prompt_tokens: int | None = given(truncation)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingBody(ReadingBody):
    """POST /v1/embeddings."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        **ReadingBody.lacking,
        "dimensions": Lacking("an embedding has the model's width"),
    }
    encoding_format: str = given(_encoding, "float")
    pooling: str = given(_pooling, "mean")  # this server's own
    normalize: bool = given(flag, False)  # to length 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassifyBody(ReadingBody):
    """POST /classify, as vLLM has it."""

    lacking: ClassVar[Mapping[str, Lacking]] = {
        **ReadingBody.lacking,
        "messages": Lacking("give the whole text as input", ([],)),
    }
    use_activation: bool = given(flag, True)  # probabilities, not logits
