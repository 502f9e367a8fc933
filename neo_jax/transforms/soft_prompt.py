"""Soft prompts as they are trained: how many virtual tokens, and what they begin as."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from neo_jax.errors import NeoError
from neo_jax.fields import check, number


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig:
    """What is read before every text, the model itself being frozen.

    Raises:
      NeoError: a number out of range, or options that go with others.
    """

    # Virtual tokens, in the place of all weights; 0 is none.
    tokens: int = number(0, least=0, words="be 0 (off) or more, not {}")
    # What they begin as: this text's tokens, again and again; without one random ones.
    init_text: str = ""
    # A .npy file, [pairs, features]: not the virtual tokens are trained but what makes them of the
    # row of each pair of the data, such as CLIP's features of the image that it is of.
    features: str = ""
    hidden: int = number(0, least=0)  # units of its hidden layer; 0 is a linear map

    def __post_init__(self) -> None:
        check(self, "soft_prompt.")
        for name in ("init_text", "features"):
            if getattr(self, name) and not self.tokens:
                raise NeoError(f"soft_prompt.{name} goes with soft_prompt.tokens, how many it is.")
        if self.hidden and not self.features:
            raise NeoError("soft_prompt.hidden is of what maps soft_prompt.features; name these.")
        if self.init_text and self.features:
            raise NeoError("what maps soft_prompt.features begins as no text; leave init_text out.")

    @property
    def shared(self) -> int:
        """How many virtual tokens all texts share."""
        return 0 if self.features else self.tokens


def first_words(count: int, words: Sequence[int], vocab_size: int, seed: int) -> np.ndarray:
    """Returns the ids of the tokens as whose embeddings a soft prompt begins.

    As PEFT has it: some words, over and over; or where there are none random ones of the whole
    vocabulary, which is better than random numbers (Lester et al., 2021, section 3.2).
    """
    if not words:
        return np.random.default_rng(seed).integers(0, vocab_size, count)
    return np.fromiter(itertools.islice(itertools.cycle(words), count), np.int64)
