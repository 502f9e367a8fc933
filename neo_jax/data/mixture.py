"""Several data sets as one, each with its share of the sequences."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from neo_jax.data.packing import TokenDataset, split_names
from neo_jax.data.writer import HELD_OUT
from neo_jax.errors import NeoError
from neo_jax.files.paths import make_path
from neo_jax.text.tokenizer import TOKENIZER_FILES


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Data sets of one tokenizer, of text or of pairs; a mixture of one is that data set."""

    parts: tuple[TokenDataset, ...]
    shares: tuple[float, ...]  # of the sequences, relative to each other

    @classmethod
    def open(
        cls,
        data: str,
        split: str = "train",
        length: int = 1024,
        across_documents: bool = True,
        soft_prompt: Sequence[int] = (),
    ) -> "Mixture":
        """Opens a split of every data set of `parse_data`, see `TokenDataset.open`.

        Those that hold nothing out have no "held_out".

        Raises:
          NeoError: a data set cannot be opened, or was prepared with another tokenizer.
        """
        parts, shares = [], []
        for folder, share in parse_data(data):
            if split == HELD_OUT and split not in split_names(folder):
                continue
            parts.append(TokenDataset.open(folder, split, length, across_documents, soft_prompt))
            shares.append(share)
            _check_tokenizers(parts[0], parts[-1])
        return cls(tuple(parts), tuple(shares))

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return self.parts[0].vocab_size

    @property
    def tokenizer_folder(self) -> Path:
        """A folder that holds the tokenizer's files."""
        return self.parts[0].tokenizer_folder

    @property
    def has_segment_starts(self) -> bool:
        """Whether any token of a sequence may be forbidden to see the first."""
        return any(part.has_segment_starts for part in self.parts)

    @property
    def bytes_per_token(self) -> float:
        """Of the text that is predicted, as it is mixed; NaN with pairs."""
        each = (part.num_target_bytes / part.num_tokens for part in self.parts)
        total = sum(share * size for share, size in zip(self.shares, each, strict=True))
        return total / sum(self.shares)


def parse_data(text: str) -> list[tuple[str, float]]:
    """Returns folders with their shares, of a folder or of several as in "pile=0.7,books=0.3".

    A text that names a folder as it stands is that folder.

    Raises:
      NeoError: a part is not a folder and a positive number.
    """
    if "=" not in text or make_path(text).exists():
        return [(text, 1.0)]
    parts = []
    for part in text.split(","):
        folder, _, number = part.strip().rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not folder or not 0 < share < math.inf:
            raise NeoError(
                f"data '{text}': '{part.strip()}' is not a folder and its share, a positive "
                "number; write for example --data pile=0.7,books=0.3"
            )
        parts.append((folder, share))
    return parts


def _check_tokenizers(first: TokenDataset, other: TokenDataset) -> None:
    if _tokenizer_of(first) != _tokenizer_of(other):
        raise NeoError(
            f"{first.tokenizer_folder} and {other.tokenizer_folder} have different tokenizers; "
            f"prepare one again with --tokenizer {first.tokenizer_folder}"
        )


def _tokenizer_of(dataset: TokenDataset) -> tuple[int, int, dict[str, bytes]]:
    paths = (dataset.tokenizer_folder / name for name in TOKENIZER_FILES)
    files = {path.name: path.read_bytes() for path in paths if path.is_file()}
    return dataset.vocab_size, dataset.eos_id, files
