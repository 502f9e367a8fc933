"""A tensor in a file: what is known of it before it is read."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

FLOATS = ("float32", "bfloat16", "float16", "float64")
"""The types that parameters are loaded from, by numpy's names."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in an open file, whatever its format."""

    path: Path
    name: str
    dtype: str  # one of FLOATS, or what the format calls another
    shape: tuple[int, ...]
    # Maps the tensor, and only it: the memory is given back with the last view. Where nothing can
    # be mapped, as in the cloud, it is read.
    view: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        """The size of the values, if they are floats or int8."""
        known = self.dtype in (*FLOATS, "int8")
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize if known else 0
