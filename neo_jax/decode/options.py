"""What a user says about the tokens of a text, and the same as arrays over a batch.

Every setting is an array, so that requests with different settings share one compiled step.
"""

import dataclasses
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Array, Bool, Float, Int, UInt
from neo_jax.decode.capacity import round_up
from neo_jax.errors import NeoError, brief, checked
from neo_jax.fields import check, choice, converted, number

_LARGEST = 1e6  # of what divides logits: float32 holds what comes of it
_COUNT = "be a whole number from 0 (off) to 2**31 - 1, not {}"
_PENALTY = "lie between -1e+06 and 1e+06, not be {}; 0 is off"
_FORCED = "be an id, or -1 for none, not {}"


def _listed(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise NeoError(f"{name} must be a list, not {brief(values)}.")
    return tuple(values)


def _ids(name: str, values: Any) -> tuple[int, ...]:
    ids = tuple(checked(f"an id of {name}", value, int) for value in _listed(name, values))
    if not all(0 <= i < 2**31 for i in ids):
        raise NeoError(f"{name} holds {min(ids) if min(ids) < 0 else max(ids)}, which is no id.")
    return ids


def _biases(name: str, values: Any) -> tuple[tuple[int, float], ...]:
    """Returns ids and what is added to their logits, of a mapping or of pairs."""
    pairs = values.items() if isinstance(values, Mapping) else _listed(name, values)
    biases: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise NeoError(f"{name} must map ids to numbers, not hold {brief(pair)}.")
        (token,) = _ids(name, pair[:1])
        biases[token] = checked(f"the bias of id {token} in {name}", pair[1], float)
        if not abs(biases[token]) <= _LARGEST:
            raise NeoError(f"{name} adds {biases[token]} to id {token}; take at most 1e+06.")
    return tuple(biases.items())


def _words(name: str, values: Any) -> tuple[tuple[int, ...], ...]:
    words = tuple(_ids(name, word) for word in _listed(name, values))
    if () in words:
        raise NeoError(f"{name} holds a word of no ids; leave it out.")
    return words


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """What a user says about sampling.

    Raises:
      NeoError: a value is out of its range.
    """

    # divides the logits; 0 takes the likeliest token
    temperature: float = number(
        0.7, least=0, most=_LARGEST, words="lie between 0 and 1e+06, not be {}"
    )
    # keep only the k likeliest tokens; 0 is off
    top_k: int = number(0, least=0, below=2**31, words=_COUNT)
    # keep the fewest tokens that hold this probability; 1 is off
    top_p: float = number(0.9, above=0, most=1, words="lie in (0, 1], not {}; 1 is off")
    # drop what is less likely than this part of the likeliest; 0 is off
    min_p: float = number(0.0, least=0, most=1, words="lie in [0, 1], not {}; 0 is off")
    # above 1 makes what the text already holds unlikelier
    repetition_penalty: float = number(1.0, above=0, most=_LARGEST, off=1)
    # no n tokens in a row occur twice, prompt included; 0 is off
    no_repeat_ngram_size: int = number(0, least=0, below=2**31, words=_COUNT)
    # the end of text cannot come before
    min_new_tokens: int = number(0, least=0, below=2**31, words=_COUNT)
    # the same prompt, options and seed give the same text; in Python None draws one
    seed: int = number(
        0, least=0, below=2**32, words="be a whole number from 0 to 2**32 - 1, not {}"
    )
    suppress_tokens: tuple[int, ...] = converted((), _ids)  # ids that are never written
    begin_suppress_tokens: tuple[int, ...] = converted((), _ids)  # ids that are not written first
    # ids of words that are not written; the end of text alone is none
    bad_words_ids: tuple[tuple[int, ...], ...] = converted((), _words)
    # the id that follows a prompt of one token; -1 is off
    forced_bos_token_id: int = number(-1, least=-1, below=2**31, words=_FORCED)
    # the id that comes last where max_new_tokens end a text; -1: off
    forced_eos_token_id: int = number(-1, least=-1, below=2**31, words=_FORCED)
    # subtracted from the logits of tokens that the new text holds; 0 is off
    presence_penalty: float = number(0.0, least=-_LARGEST, most=_LARGEST, words=_PENALTY)
    # subtracted once for each time that the new text holds a token; 0 is off
    frequency_penalty: float = number(0.0, least=-_LARGEST, most=_LARGEST, words=_PENALTY)
    # an id, and what is added to its logit, as in 50256 -100; in Python {50256: -100}
    logit_bias: tuple[tuple[int, float], ...] = converted((), _biases)
    # the end of text is a token like all others, and max_new_tokens end a text
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.seed is None:
            object.__setattr__(self, "seed", secrets.randbelow(2**32))
        check(self)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = getattr(self, name)
            if forced in self.suppress_tokens:
                raise NeoError(f"{name} {forced} is one of suppress_tokens; leave out one of them.")

    @property
    def bans(self) -> list[tuple[tuple[int, ...], bool]]:
        """Ids that may not follow each other, and whether that is for the first new token alone."""
        first = [((i,), True) for i in self.begin_suppress_tokens]
        return [*first, *(((i,), False) for i in self.suppress_tokens),
                *((word, False) for word in self.bad_words_ids)]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """What a user says about beam search.

    Raises:
      NeoError: a value is out of its range.
    """

    # texts that are searched side by side; 1 draws samples instead
    num_beams: int = number(1, least=1)
    # scores are divided by length to this power: above 0 favours long
    length_penalty: float = number(
        1.0, least=-100, most=100, words="lie between -100.0 and 100.0, not be {}"
    )
    # where a search with all its texts finished is over: True at once; False when the best of the
    # others, as long as it is now, is no better; never when it cannot become better
    early_stopping: bool | Literal["never"] = choice(False, (True, False, "never"))

    def __post_init__(self) -> None:
        check(self)


class Settings(NamedTuple):
    """`SamplingOptions` of every row."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    no_repeat_ngram_size: Int[Array, "B"]
    min_new_tokens: Int[Array, "B"]
    seed: UInt[Array, "B"]
    forced_bos_token_id: Int[Array, "B"]
    forced_eos_token_id: Int[Array, "B"]
    # Ids of which the last may not follow the others; -1 before them is any token, all of them none
    bans: Int[Array, "B N L"]
    bans_first: Bool[Array, "B N"]  # whether that is for the first new token alone
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    ignore_eos: Bool[Array, "B"]
    bias_ids: Int[Array, "B M"]  # -1 is none
    biases: Float[Array, "B M"]
    alternatives: Bool[Array, "B K"]  # which of the K likeliest tokens are kept with each


_COLUMNS = {
    field.name: {int: np.int32, float: np.float32, bool: np.bool_}[type(field.default)]
    for field in dataclasses.fields(SamplingOptions)
    if type(field.default) is not tuple
} | {"seed": np.uint32}


class Room(NamedTuple):
    """How much a row has room for of what has no fixed size: few sizes, as few programs."""

    bans: int = 16
    ban_length: int = 4  # ids
    biases: int = 0
    alternatives: int = 0  # likeliest tokens that may be kept next to each new one


ROOM = Room()
"""For requests without much of it."""


def room_for(options: Iterable[SamplingOptions]) -> Room:
    """Returns a room for what these options ban and favour."""
    options = list(options)
    bans = [each.bans for each in options]
    most = max((len(each) for each in bans), default=0)
    longest = max((len(ids) for each in bans for ids, _ in each), default=0)
    biases = max((len(each.logit_bias) for each in options), default=0)
    return Room(
        max(ROOM.bans, round_up(most)) if most else ROOM.bans,
        max(ROOM.ban_length, round_up(longest)) if longest else ROOM.ban_length,
        max(16, round_up(biases)) if biases else 0,
    )


def stack_settings(
    options: Sequence[SamplingOptions],
    room: Room | None = None,
    num_alternatives: Sequence[int] = (),
) -> Settings:
    """Returns a row for each of several options.

    Args:
      options: of the rows.
      room: see `Room`; where these options join others it is that of all.
      num_alternatives: for each of the options, or none of all.
    """
    # Filled by numpy: jnp.full would compile a program for each.
    rows, room = len(options), room or room_for(options)
    bans = np.full((rows, room.bans, room.ban_length), -1, np.int32)
    first = np.zeros(bans.shape[:2], bool)
    bias_ids = np.full((rows, room.biases), -1, np.int32)
    biases = np.zeros(bias_ids.shape, np.float32)
    for row, each in enumerate(options):
        for i, (ids, is_first) in enumerate(each.bans):
            bans[row, i, -len(ids) :] = ids
            first[row, i] = is_first
        for i, (token, bias) in enumerate(each.logit_bias):
            bias_ids[row, i], biases[row, i] = token, bias
    columns: dict[str, Any] = {
        name: np.array([getattr(each, name) for each in options], dtype)
        for name, dtype in _COLUMNS.items()
    }
    counts = np.array(num_alternatives or [0] * rows)[:, None]
    columns |= {"bans": bans, "bans_first": first, "bias_ids": bias_ids, "biases": biases}
    columns |= {"alternatives": np.arange(room.alternatives)[None] < counts}
    return Settings(**{name: jnp.asarray(column) for name, column in columns.items()})


def make_settings(options: SamplingOptions, seeds: Sequence[int]) -> Settings:
    """Returns the same options for every row, a row for each seed."""
    return stack_settings([dataclasses.replace(options, seed=int(seed)) for seed in seeds])
