"""Features of pairs: a .npy file of numbers, [pairs, features], such as CLIP's of images."""

import dataclasses
import os

import numpy as np

from neo_jax.data.mixture import Mixture
from neo_jax.data.packing import PairDataset, Sequence
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import is_file, make_path

_ROWS = 4096  # that are looked at together


def open_features(path: str | os.PathLike[str]) -> np.ndarray:
    """Opens a file of features, [rows, features], as it is on disk.

    Raises:
      NeoError: it cannot be read, has another shape, or holds what is no finite number.
    """
    if not is_file(make_path(path)):
        raise NeoError(f"cannot read {path}: no such file; give a .npy file, a row for each text.")
    try:
        features = np.load(make_path(path), mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    except Exception as error:  # numpy reads the header as Python, which may fail in any way
        raise NeoError(
            f"{path} is no .npy file of numbers; write one with numpy.save, a row for each text."
        ) from error
    if not isinstance(features, np.ndarray) or features.ndim != 2 or 0 in features.shape:
        shape = list(getattr(features, "shape", []))
        raise NeoError(f"{path} has the shape {shape}; give a row of features for each text.")
    if features.dtype.kind not in "fiu":
        raise NeoError(f"{path} holds {features.dtype}, no numbers; save features as float32.")
    for first in range(0, len(features), _ROWS):
        is_fine = np.isfinite(features[first : first + _ROWS]).all(axis=1)
        if not is_fine.all():
            row = first + int(np.argmin(is_fine))
            raise NeoError(f"{path}: row {row} holds numbers that are not finite; make it again.")
    return features


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FeaturedPairs(PairDataset):
    """Pairs with a row of features each; a sequence is one pair, and has "features" too."""

    features: np.ndarray  # [num_documents, features]

    def sequence(self, i: int) -> Sequence:
        """Returns sequence i, with the features of its pair, float32."""
        row = self.features[self.bounds[i][0]]
        return super().sequence(i) | {"features": np.asarray(row, np.float32)}


def with_features(dataset: Mixture, path: str) -> Mixture:
    """Returns a data set of pairs with features: row i of the file is of its pair i.

    Raises:
      NeoError: see `open_features`; or the data set is not one of pairs, or of another number.
    """
    features = open_features(path)
    if len(dataset.parts) != 1 or not isinstance(dataset.parts[0], PairDataset):
        raise NeoError("soft_prompt.features are of the pairs of one data set; name one in data.")
    pairs = dataset.parts[0]
    if len(features) != pairs.num_documents:
        raise NeoError(
            f"{path} has {len(features)} rows, and {pairs.tokenizer_folder} {pairs.num_documents} "
            "pairs to train on; give a row for each, and prepare them without held_out."
        )
    lengths = np.diff(pairs.offsets) + len(pairs.soft_prompt)
    first = np.flatnonzero(lengths <= pairs.length + 1)
    bounds = np.stack([first, first + 1], axis=1)
    fields = vars(pairs) | {"bounds": bounds, "features": features}
    return Mixture((FeaturedPairs(**fields),), (1.0,))
