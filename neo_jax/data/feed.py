"""Batches on the host: the training batch is a function of (seed, step) and of nothing else.

So the iterator's whole state is the step: a run resumes at any step at no cost, on any number of
processes. Each of them names the rows of the batch that its devices hold, and reads no others.

Every batch is a dictionary, for R rows, of
  tokens:  int32 [R, T + 1]; inputs are [:, :-1], targets [:, 1:]
  weights: float32 [R, T]; 1 where a target counts, 0 where it is padding
"""

from collections.abc import Iterator, Sequence

import numpy as np

from neo_jax.data.packing import TokenDataset
from neo_jax.errors import NeoError

Batch = dict[str, np.ndarray]

_EPOCHS = 2**20  # "without end": grain's own endless repetition overflows with batches of one
_AHEAD = 8  # batches read ahead
_THREADS = _AHEAD  # in the cloud each of them waits for its answer


def batches(
    dataset: TokenDataset,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields training batches without end, shuffled anew every epoch.

    An epoch holds every sequence once; a batch may hold the end of one and the start of the next.

    Args:
      dataset: the sequences.
      batch_size: of the global batch.
      seed: of the order, from 0 to 2**32 - 1.
      start_step: the first batch to yield is the one of this step.
      rows: which rows of the global batch to yield, in this order; None for all.

    Raises:
      NeoError: a number is out of range.
    """
    if batch_size < 1:
        raise NeoError(f"a batch of {batch_size} holds nothing; give it at least one sequence.")
    if not 0 <= seed < 2**32:
        raise NeoError(f"the seed is a whole number from 0 to 2**32 - 1, not {seed}.")
    if start_step < 0:
        raise NeoError(f"the first step cannot be {start_step}; count steps from 0.")
    rows = range(batch_size) if rows is None else rows
    return _shuffled_batches(dataset, batch_size, rows, seed, start_step)


def _shuffled_batches(
    dataset: TokenDataset, batch_size: int, rows: Sequence[int], seed: int, step: int
) -> Iterator[Batch]:
    import grain

    stream = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat(_EPOCHS)

    def element(i: int) -> dict[str, np.ndarray]:
        steps, row = divmod(i, len(rows))
        return stream[steps * batch_size + rows[row]]

    places = grain.MapDataset.range(step * len(rows), len(stream) // batch_size * len(rows))
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    for batch in places.map(element).batch(len(rows)).to_iter_dataset(options):
        tokens = batch["tokens"]
        yield {"tokens": tokens, "weights": np.ones_like(tokens[:, 1:], np.float32)}


def num_batches_per_epoch(dataset: TokenDataset, batch_size: int) -> int:
    """Returns the number of global batches after which every sequence was seen at least once."""
    return -(-len(dataset) // batch_size)


def evaluation_batches(
    dataset: TokenDataset, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yields the split once, in order: every token but the very first is a target exactly once.

    The tokens at the end that fill no sequence come as a last, padded one, so the losses add up to
    that of the whole split. The last batch is filled with padding: zeros of weight 0. There are as
    many batches whichever `rows` of the global batch are asked for.
    """
    rows = range(batch_size) if rows is None else rows
    length = dataset.length
    for first in range(0, -(-(dataset.num_tokens - 1) // length), batch_size):
        tokens = np.zeros([len(rows), length + 1], np.int32)
        weights = np.zeros([len(rows), length], np.float32)
        for i, row in enumerate(rows):
            start = (first + row) * length
            sequence = dataset.tokens[start : start + length + 1]
            tokens[i, : len(sequence)] = sequence
            weights[i, : max(len(sequence) - 1, 0)] = 1
        yield {"tokens": tokens, "weights": weights}
