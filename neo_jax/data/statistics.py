"""How long the documents of a split are, and a picture of it."""

from pathlib import Path
from typing import Any

import numpy as np

_CHUNK = 1 << 20  # documents looked at at once
_LONGEST = 1 << 20  # tokens; above, documents are counted as if they were so long


def length_statistics(offsets_file: Path) -> dict[str, Any]:
    """Returns statistics of the tokens a document, of which the end of text is one.

    Args:
      offsets_file: offsets.npy of a split with a document or more.

    Returns:
      "median" (the lower one; at most 2**20), "mean", "longest", and "histogram": a list whose item
      i counts the documents of 2**i to 2**(i + 1) - 1 tokens, the last those of 2**20 or more.
    """
    offsets = np.load(offsets_file, mmap_mode="r")
    documents = len(offsets) - 1
    counts = np.zeros(_LONGEST + 1, np.int64)
    longest = 0
    for start in range(0, documents, _CHUNK):
        lengths = np.diff(offsets[start : start + _CHUNK + 1])
        longest = max(longest, int(lengths.max()))
        counts += np.bincount(np.minimum(lengths, _LONGEST), minlength=len(counts))
    edges = 2 ** np.arange(_LONGEST.bit_length())
    return {
        "median": int(np.searchsorted(np.cumsum(counts), (documents + 1) // 2)),
        "mean": round(int(offsets[-1]) / documents, 1),
        "longest": longest,
        "histogram": np.trim_zeros(np.add.reduceat(counts, edges), "b").tolist(),
    }


def draw_histogram(counts: list[int], width: int = 40) -> str:
    """Returns a line for each count from the first that is not 0: the least length and a bar."""
    first = next(i for i, count in enumerate(counts) if count)
    labels = [f"{2**i:,}" for i in range(len(counts))]
    rows = []
    for label, count in list(zip(labels, counts, strict=True))[first:]:
        eighths = -(-count * width * 8 // max(counts))  # rounded up: one document is seen
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        rows.append(" ".join(filter(None, [f"{label:>{len(labels[-1])}}", bar, f"{count:,}"])))
    return "\n".join(rows)
