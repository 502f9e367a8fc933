"""The data set that `prepare` wrote, as sequences of one length."""

import dataclasses
import io
import math
import os
from collections import abc
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from neo_jax.data.writer import (
    DATASET_FILE,
    HELD_OUT,
    OFFSETS_FILE,
    PROMPTS_FILE,
    TOKENS_FILE,
    VERSION,
)
from neo_jax.devices.processes import say
from neo_jax.errors import NeoError, reason, suggest
from neo_jax.files.json_text import read_json
from neo_jax.files.paths import file_size, is_file, is_remote, make_path, read_range


@dataclasses.dataclass(frozen=True)
class RemoteTokens:
    """The tokens of a file in the cloud: what a memory map is on disk, of which slices are read."""

    path: Path
    dtype: np.dtype
    num_tokens: int

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Reads the tokens of a slice without a step."""
        start, stop, _ = part.indices(self.num_tokens)
        if stop <= start:
            return np.empty(0, self.dtype)
        size = self.dtype.itemsize
        return np.frombuffer(read_range(self.path, start * size, stop * size), self.dtype)


Sequence = dict[str, np.ndarray]
"""Of `length` predictions: "tokens" int32 [length + 1], of which each but the last predicts the
next; "weights" float32 [length], 1 where a prediction counts and 0 where not; "segment_starts"
int32 [length], the place of the first token that each one may see."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenDataset:
    """A split of a data set, cut into sequences without regard to where documents end.

    Sequence i holds the tokens from i * length to i * length + length inclusive: its last token is
    the first of the next. With inputs [:-1] and targets [1:] every token but the very first is a
    target exactly once. The fewer than `length` at the end that fill no sequence are one more, for
    evaluation.
    """

    tokens: np.ndarray | RemoteTokens  # [num_tokens], memory-mapped; uint16 or uint32
    length: int  # targets of a sequence
    num_bytes: int  # of the documents' text in UTF-8
    num_documents: int
    vocab_size: int
    eos_id: int
    tokenizer_folder: Path  # holds the tokenizer's files
    offsets: np.ndarray | None = None  # where documents begin, if tokens see only their own
    soft_prompt: abc.Sequence[int] = ()  # ids before every text, whose own tokens are as many fewer

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        split: str = "train",
        length: int = 1024,
        across_documents: bool = True,
        soft_prompt: abc.Sequence[int] = (),
    ) -> "TokenDataset":
        """Opens a split, "train" or "held_out", as sequences of `length` predictions.

        With a soft prompt, ids of virtual tokens, that many tokens of a sequence, and of each pair,
        are it; what follows them is predicted.

        Tokens may see other documents of their sequence, or if not `across_documents` only their
        own, of which the end of text before it counts as the first token. Pairs, a `PairDataset`,
        never see each other.

        Raises:
          NeoError: no data set, or one of examples with labels, no such split, files that do not
            match dataset.json, fewer tokens than one sequence takes, no pair that fits one, or no
            documents to tell apart, or which a soft prompt would not precede.
        """
        folder = make_path(folder)
        if not (folder / DATASET_FILE).is_file():
            raise NeoError(
                f"{folder} holds no data set; make one: neo-jax prepare FILE... --output {folder}"
            )
        fields = read_json(folder / DATASET_FILE)
        if fields.get("version") != VERSION:
            raise NeoError(
                f"{folder / DATASET_FILE} has version {fields.get('version')!r}, not {VERSION}; "
                "run neo-jax prepare again."
            )
        if "kind" in fields:  # of `labelled`
            raise NeoError(f"{folder} holds examples with labels; train on these alone.")
        splits = _field(folder, fields, "splits", dict)
        if split not in splits:
            raise NeoError(f"{folder} has no split '{split}'.{suggest(split, splits)}")
        if length < 1:
            raise NeoError(f"the length of a sequence must be at least 1, not {length}.")
        num_tokens, num_bytes, num_documents = (
            _field(folder, splits[split], name, int) for name in ("tokens", "bytes", "documents")
        )
        name, pairs = f"split '{split}' of {folder}", fields.get("pairs", False)
        if not pairs:
            length -= len(soft_prompt)
        # Of a split that only evaluates, a sequence that is not full counts too.
        if num_tokens < (2 if pairs or split == HELD_OUT else length + 1):
            fix = f"choose a length below {num_tokens}, or " if num_tokens > 1 else ""
            raise NeoError(
                f"{name} has {num_tokens} tokens, too few for a sequence of {length}; {fix}"
                "prepare more text."
            )
        dataset = cls(
            tokens=_map(folder, split, _field(folder, fields, "dtype", str), num_tokens),
            length=length,
            num_bytes=num_bytes,
            num_documents=num_documents,
            vocab_size=_field(folder, fields, "vocab_size", int),
            eos_id=_field(folder, fields, "eos_id", int),
            tokenizer_folder=folder,
            soft_prompt=soft_prompt,
        )
        if across_documents and not pairs:
            return dataset
        offsets = _numbers(folder / split / OFFSETS_FILE, num_documents + 1)
        if pairs:
            prompts = _numbers(folder / split / PROMPTS_FILE, num_documents)
            return _pairs(dataset, offsets, prompts, name)
        if soft_prompt:
            raise NeoError(
                "a soft prompt precedes a sequence, of which documents that are kept apart would "
                "not see it; leave across_documents on, or prepare pairs."
            )
        _check_documents(dataset, offsets, name)
        return dataclasses.replace(dataset, offsets=offsets)

    @property
    def num_tokens(self) -> int:
        """Tokens of the split, ends of text included."""
        return len(self.tokens)

    @property
    def num_target_bytes(self) -> float:
        """Bytes of the text that is predicted; NaN for pairs, whose completions are not counted."""
        return float(self.num_bytes)

    @property
    def has_segment_starts(self) -> bool:
        """Whether any token of a sequence may be forbidden to see the first."""
        return self.offsets is not None

    def __len__(self) -> int:
        """Returns the number of whole sequences."""
        return (self.num_tokens - 1) // self.length

    @property
    def num_sequences(self) -> int:
        """The number of whole sequences, and of the one at the end that has to be padded."""
        return -(-(self.num_tokens - 1) // self.length)

    def __getitem__(self, index: SupportsIndex) -> Sequence:
        """Returns sequence `index`."""
        return self.sequence(range(len(self))[index])  # negative indices, and IndexError

    def sequence(self, i: int) -> Sequence:
        """Returns sequence i, from 0 to before `num_sequences`; zeros of weight 0 fill it up."""
        first = i * self.length
        tokens = self.tokens[first : first + self.length + 1]
        segment_starts = np.zeros(self.length, np.int32)
        if self.offsets is not None:
            ends = [first + 1, first + self.length + 1]
            before, after = np.searchsorted(self.offsets, ends)
            cuts = self.offsets[before:after] - 1 - first  # the ends of text
            if not ((cuts >= 0) & (cuts < self.length)).all():
                raise NeoError(_DAMAGED_OFFSETS.format("the data set"))
            segment_starts[cuts] = cuts
            segment_starts = np.maximum.accumulate(segment_starts)
        weights, lead = np.ones(len(tokens) - 1), len(self.soft_prompt)
        if lead:  # the first token of a sequence is the last of the one before, and no target
            tokens = np.concatenate([self.soft_prompt, tokens])
            weights = np.pad(weights, (lead, 0))
            segment_starts = np.pad(segment_starts, (lead, 0))
        return _sequence(self.length + lead, tokens, weights, segment_starts)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class PairDataset(TokenDataset):
    """Pairs of prompt and completion: a sequence holds as many whole ones as fit, in their order.

    What counts are completions with their ends of text, the first token of a pair never; no pair
    sees another one. Those that are longer than a sequence are left out. Each is behind the soft
    prompt, if there is one.
    """

    offsets: np.ndarray  # [num_documents + 1]: where pairs begin
    prompts: np.ndarray  # [num_documents]: how many tokens of each are its prompt
    bounds: np.ndarray  # [sequences, 2]: the first pair of each, and the one behind its last

    @property
    def num_target_bytes(self) -> float:
        """NaN: how many bytes completions have is not recorded."""
        return math.nan

    def __len__(self) -> int:
        """Returns the number of sequences."""
        return len(self.bounds)

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return len(self.bounds)

    def sequence(self, i: int) -> Sequence:
        """Returns sequence i; zeros of weight 0, each its own start, fill it up."""
        first, behind = self.bounds[i]
        lead = len(self.soft_prompt)
        offsets = self.offsets[first : behind + 1]
        tokens = self.tokens[offsets[0] : offsets[-1]].astype(np.int32)
        starts = np.repeat(offsets[:-1] - offsets[0], lead)
        tokens = np.insert(tokens, starts, np.tile(self.soft_prompt, behind - first))
        offsets = offsets - offsets[0] + lead * np.arange(behind - first + 1)
        lengths = np.diff(offsets)
        begins = np.repeat(offsets[:-1], lengths)  # of the pair of each token
        places = np.arange(len(tokens)) - begins  # in its pair
        counts = (places > 0) & (places >= np.repeat(lead + self.prompts[first:behind], lengths))
        segment_starts = np.arange(self.length)
        segment_starts[: len(begins)] = begins[: self.length]
        return _sequence(self.length, tokens, counts[1:], segment_starts)


def _pairs(
    dataset: TokenDataset, offsets: np.ndarray, prompts: np.ndarray, name: str
) -> PairDataset:
    """Returns a data set of pairs, and reports how many are left out."""
    ends = offsets + len(dataset.soft_prompt) * np.arange(len(offsets))
    lengths = np.diff(ends)
    bounds = _whole_documents(ends, dataset.length + 1)
    if not bounds:
        raise NeoError(
            f"no pair of {name} fits a sequence of {dataset.length}; choose a length of "
            f"{lengths.min() - 1} or more."
        )
    left_out = np.count_nonzero(lengths > dataset.length + 1)
    if left_out:
        pairs = f"{left_out:,} of {len(lengths):,} pairs of {name}"
        say(f"{pairs} are longer than {dataset.length} and left out")
    fields = vars(dataset) | {"offsets": offsets}
    return PairDataset(**fields, prompts=prompts, bounds=np.array(bounds))


def _whole_documents(offsets: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Returns runs of documents of at most so many tokens, each as long as can be.

    A document that is longer is in none.
    """
    # For each document the one behind the last that a run from it can hold.
    ends = (np.searchsorted(offsets, offsets[:-1] + most, "right") - 1).tolist()
    runs, first = [], 0
    while first < len(ends):
        if ends[first] > first:
            runs.append((first, ends[first]))
        first = max(ends[first], first + 1)
    return runs


def _sequence(
    length: int, tokens: np.ndarray, weights: np.ndarray, segment_starts: np.ndarray
) -> Sequence:
    """Returns a sequence, filled up with zeros."""
    return {
        "tokens": np.pad(tokens.astype(np.int32), (0, length + 1 - len(tokens))),
        "weights": np.pad(weights.astype(np.float32), (0, length - len(weights))),
        "segment_starts": segment_starts.astype(np.int32),
    }


def split_names(folder: str | os.PathLike[str]) -> list[str]:
    """Returns the splits that a data set has."""
    folder = make_path(folder)
    return list(_field(folder, read_json(folder / DATASET_FILE), "splits", dict))


def _field(folder: Path, fields: Any, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, kind):
        raise NeoError(f"{folder / DATASET_FILE}: '{name}' is {value!r}; is the file whole?")
    return value


def _check_documents(dataset: TokenDataset, offsets: np.ndarray, name: str) -> None:
    """Refuses TFRecords of pieces of a stream, whose offsets are not where documents begin."""
    ends = offsets[1:9]
    if not ((ends > 0) & (ends <= dataset.num_tokens)).all():
        raise NeoError(_DAMAGED_OFFSETS.format(name))
    if any(dataset.tokens[int(end) - 1 : int(end)][0] != dataset.eos_id for end in ends):
        raise NeoError(
            f"{name} holds pieces of a stream, which do not tell where documents end; prepare the "
            "text instead, or leave across_documents on."
        )


_DAMAGED_OFFSETS = "{} has a damaged offsets.npy; copy it again, or run neo-jax prepare again."


def _numbers(path: Path, count: int) -> np.ndarray:
    if not is_file(path):  # numpy would wait for a pipe
        raise NeoError(f"cannot read {path}: No such file.")
    try:
        if is_remote(path):
            numbers = np.load(io.BytesIO(path.read_bytes()))
        else:
            numbers = np.load(path, mmap_mode="r")
    except Exception as error:  # numpy reads the header as Python, which may fail in any way
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    if numbers.shape != (count,):
        raise NeoError(
            f"{path} has {numbers.size} numbers, not {count}; copy it again, or run neo-jax "
            "prepare again."
        )
    return numbers


def _map(folder: Path, split: str, dtype: str, num_tokens: int) -> np.ndarray | RemoteTokens:
    if dtype not in ("uint16", "uint32"):
        raise NeoError(f"{folder / DATASET_FILE}: dtype '{dtype}' is not uint16 or uint32.")
    path = folder / split / TOKENS_FILE
    item = np.dtype(dtype).newbyteorder("<")
    needed = num_tokens * item.itemsize
    try:
        size = file_size(path)
        if size != needed:
            raise NeoError(
                f"{path} has {size} bytes where {num_tokens} tokens take {needed}; copy it again, "
                "or run neo-jax prepare again."
            )
        if is_remote(path):
            return RemoteTokens(path, item, num_tokens)
        return np.memmap(path, item, mode="r", shape=(num_tokens,))
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
