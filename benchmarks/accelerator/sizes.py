"""How large everything is: as released on an accelerator, tiny where the script is tested."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from neo_jax.config import ModelConfig, preset
from neo_jax.model.scan import Remat


class Heads(NamedTuple):
    """Queries, keys and values that attention is tried on."""

    batch: int
    heads: int
    length: int
    head_dim: int
    window: int | None


class Texts(NamedTuple):
    """Greedy texts of a model: tokens of the prompts, and new ones."""

    config: ModelConfig
    length: int
    new: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Shapes of all parts."""

    models: Mapping[str, ModelConfig]  # those that are timed, by preset
    attention: tuple[Heads, ...]
    parity: Mapping[str, Texts]
    batches: tuple[int, ...]  # of decoding
    room: int  # slots of a cache, and the end of a text
    new_tokens: int  # that transformers decodes
    prefill: tuple[int, int]  # sequences, tokens of each
    length: int  # of sequences in training
    # By model what to try until one fits: sequences, and what the backward pass computes again.
    # These models are also what transformers is timed on.
    training: Mapping[str, tuple[tuple[int, Remat], ...]]
    read_bytes: int  # to measure memory's bandwidth
    seconds: float  # that are timed at once


_TINY = ModelConfig(
    vocab_size=300,
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    window_size=8,
    max_length=128,
    eos_token_id=-1,  # no text ends early
)
_RELEASED = {
    name: dataclasses.replace(preset(name), eos_token_id=-1)
    for name in ("gpt-neo-125m", "gpt-neo-1.3b", "gpt-neo-2.7b")
}

FULL = Sizes(
    models=_RELEASED,
    attention=(
        Heads(2, 4, 1024, 64, 256),
        Heads(2, 4, 2047, 128, 256),
        Heads(2, 4, 1021, 64, None),
        Heads(2, 2, 333, 80, 17),
    ),
    parity={
        "tiny": Texts(_TINY, 24, 64),
        "gpt-neo-125m, 4 layers": Texts(  # of 12: each is compiled in three programs
            dataclasses.replace(_RELEASED["gpt-neo-125m"], num_layers=4), 300, 64
        ),
    },
    batches=(1, 64),
    room=1024,
    new_tokens=64,
    prefill=(4, 2048),  # the most that is read in one pass
    length=2048,
    training={
        "gpt-neo-125m": ((16, "none"), (8, "none"), (8, "full")),
        "gpt-neo-1.3b": ((4, "none"), (8, "full"), (2, "full")),
    },
    read_bytes=2**30,
    seconds=0.5,
)

SMALL = Sizes(
    models={"gpt-neo-125m": _TINY},
    attention=(Heads(1, 2, 33, 8, 5),),
    parity={"tiny": Texts(_TINY, 12, 8)},
    batches=(3,),
    room=64,
    new_tokens=4,
    prefill=(2, 32),
    length=32,
    training={"gpt-neo-125m": ((2, "none"),)},
    read_bytes=2**22,
    seconds=0.02,
)
