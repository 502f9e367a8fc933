"""Batches on the host: the training batch is a function of (seed, step) and of nothing else.

So the iterator's whole state is the step: a run resumes at any step at no cost, on any number of
processes. Each of them names the rows of the batch that its devices hold, and reads no others.

Every batch is a dictionary, for R rows, of
  tokens:  int32 [R, T + 1]; inputs are [:, :-1], targets [:, 1:]
  weights: float32 [R, T]; 1 where a target counts, 0 where it is a prompt or padding
  segment_starts: int32 [R, T]; the place of the first token that each input may see
"""

from collections.abc import Iterator, Sequence

import numpy as np

from neo_jax.data.mixture import Mixture
from neo_jax.data.packing import TokenDataset
from neo_jax.errors import NeoError

HostBatch = dict[str, np.ndarray]

_EPOCHS = 2**20  # "without end": grain's own endless repetition overflows with batches of one
_AHEAD = 8  # batches read ahead
_THREADS = _AHEAD  # in the cloud each of them waits for its answer


def batches(
    dataset: TokenDataset | Mixture,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[HostBatch]:
    """Yields training batches without end, shuffled anew every epoch.

    An epoch holds every sequence once; a batch may hold the end of one and the start of the next.
    Of a mixture each part has epochs of its own, and its share of every stretch of sequences. The
    first batch is that of `start_step`; of each some rows are yielded in their order, or all.

    Raises:
      NeoError: a number is out of range.
    """
    if batch_size < 1:
        raise NeoError(f"a batch of {batch_size} holds nothing; give it at least one sequence.")
    if not 0 <= seed < 2**32:
        raise NeoError(f"the seed is a whole number from 0 to 2**32 - 1, not {seed}.")
    if start_step < 0:
        raise NeoError(f"the first step cannot be {start_step}; count steps from 0.")
    import grain

    rows = range(batch_size) if rows is None else rows
    mixture = dataset if isinstance(dataset, Mixture) else Mixture((dataset,), (1.0,))
    streams = [
        grain.MapDataset.source(part).seed((seed + i) % 2**32).shuffle().repeat(_EPOCHS)
        for i, part in enumerate(mixture.parts)
    ]
    stream = grain.MapDataset.mix(streams, mixture.shares)  # whose shares are right to 1 in 100

    def element(i: int) -> dict[str, np.ndarray]:
        step, row = divmod(i, len(rows))
        return stream[step * batch_size + rows[row]]

    places = grain.MapDataset.range(start_step * len(rows), len(stream) // batch_size * len(rows))
    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
    return iter(places.map(element).batch(len(rows)).to_iter_dataset(options))


def evaluation_batches(
    dataset: TokenDataset, batch_size: int, rows: Sequence[int] | None = None
) -> Iterator[HostBatch]:
    """Yields the split once, in order: what counts in it is a target exactly once.

    The tokens at the end of a stream that fill no sequence come as a last, padded one, so the
    losses add up to that of the whole split. The last batch is filled with padding: zeros of weight
    0. There are as many batches whichever `rows` of the global batch are requested.
    """
    rows = range(batch_size) if rows is None else rows
    padding = {name: np.zeros_like(array) for name, array in dataset.sequence(0).items()}
    count = dataset.num_sequences
    for first in range(0, count, batch_size):
        numbers = [first + row for row in rows]
        sequences = [dataset.sequence(i) if i < count else padding for i in numbers]
        yield {name: np.stack([each[name] for each in sequences]) for name in padding}
