"""Batches on the host: the training batch is a function of (seed, step) and of nothing else.

So the iterator's whole state is the step: a run resumes at any step at no cost, on any number of
processes, each of which reads only its own rows of the global batch.

Every batch is a dictionary of
  tokens:  int32 [B, T + 1]; inputs are [:, :-1], targets [:, 1:]
  weights: float32 [B, T]; 1 where a target counts, 0 where it is padding
"""

from collections.abc import Iterator

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
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Yields training batches without end, shuffled anew every epoch.

    An epoch holds every sequence once; a batch may hold the end of one and the start of the next.

    Args:
      dataset: the sequences.
      batch_size: B of the global batch; a process yields its `batch_size / process_count` rows.
      seed: of the order, from 0 to 2**32 - 1.
      start_step: the first batch to yield is the one of this step.
      process_index: which rows to yield; in the order of processes they are the global batch.
      process_count: processes that share the batch.

    Raises:
      NeoError: the batch does not divide among the processes, or a number is out of range.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    if not 0 <= seed < 2**32:
        raise NeoError(f"the seed is a whole number from 0 to 2**32 - 1, not {seed}.")
    if start_step < 0:
        raise NeoError(f"the first step cannot be {start_step}; count steps from 0.")
    return _shuffled_batches(dataset, rows, seed, start_step, process_index, process_count)


def _shuffled_batches(
    dataset: TokenDataset, rows: int, seed: int, step: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    import grain

    stream = grain.MapDataset.source(dataset).seed(seed).shuffle().repeat(_EPOCHS)
    # The stream in runs of `rows`: every process_count-th run is this process's part of a batch.
    mine = stream.batch(rows)[step * process_count + process_index :: process_count]
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    for batch in mine.to_iter_dataset(options):
        tokens = batch["tokens"]
        yield {"tokens": tokens, "weights": np.ones_like(tokens[:, 1:], np.float32)}


def num_batches_per_epoch(dataset: TokenDataset, batch_size: int) -> int:
    """Returns the number of global batches after which every sequence was seen at least once."""
    return -(-len(dataset) // batch_size)


def evaluation_batches(
    dataset: TokenDataset, batch_size: int, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields the split once, in order: every token but the very first is a target exactly once.

    The tokens at the end that fill no sequence come as a last, padded one, so the losses add up to
    that of the whole split. The last batch is filled with padding: zeros of weight 0. Every
    process yields as many batches, each its rows.

    Raises:
      NeoError: the batch does not divide among the processes, or a number is out of range.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    return _ordered_batches(dataset, batch_size, rows, process_index * rows)


def _ordered_batches(
    dataset: TokenDataset, batch_size: int, rows: int, first_row: int
) -> Iterator[Batch]:
    length = dataset.length
    for first in range(0, -(-(dataset.num_tokens - 1) // length), batch_size):
        tokens = np.zeros([rows, length + 1], np.int32)
        weights = np.zeros([rows, length], np.float32)
        for row in range(rows):
            start = (first + first_row + row) * length
            sequence = dataset.tokens[start : start + length + 1]
            tokens[row, : len(sequence)] = sequence
            weights[row, : max(len(sequence) - 1, 0)] = 1
        yield {"tokens": tokens, "weights": weights}


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise NeoError(
            f"a batch of {batch_size} does not divide among {process_count} processes; choose a "
            f"multiple of {process_count}."
        )
    if not 0 <= process_index < process_count:
        raise NeoError(f"process {process_index} is not one of {process_count}.")
    return batch_size // process_count
