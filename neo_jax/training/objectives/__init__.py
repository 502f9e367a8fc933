"""What training minimises: a value that the step, its check before a run and evaluation take."""

from typing import Any, NamedTuple, Protocol

from neo_jax.axes import Array, Params
from neo_jax.model.transformer import Neo


class Sums(NamedTuple):
    """Scalars, summed over a batch or a part of one: over all parts they add up."""

    loss: Array  # what is reported, times the weight
    objective: Array  # what is minimised, times the weight
    weight: Array  # of what the batch holds, such as the number of predictions


class Objective(Protocol):
    """What training minimises: a frozen dataclass of settings.

    Batches, and what `embed` returns, are trees of arrays that all lead with the rows of the batch,
    so that it can be split over devices and cut into parts. Parameters are stacked, see
    `neo_jax.model.scan`, with those of `init` next to the model's.
    """

    def init(self, model: Neo, key: Array) -> Params:
        """Draws parameters of its own, float32, of other names than the model's; or none.

        Every device holds all of them.
        """

    def batch_spec(self, rows: int, length: int, has_segment_starts: bool) -> Any:
        """Returns a NamedTuple with the names of the feed, each leaf a `ShapeDtypeStruct`.

        Sequences have `length` tokens. Where `has_segment_starts` is false, such a field is None.
        """

    def embed(self, model: Neo, params: Params, batch: Any, key: Array | None = None) -> Any:
        """Returns what the first block reads of a batch; a key is for dropout."""

    def loss(
        self, model: Neo, params: Params, batch: Any, *, embedded: Any = None, **options: Any
    ) -> Sums:
        """Returns the sums of a batch.

        `embedded` is what `embed` returned, where that is known. The options are those of
        `neo_jax.model.scan.hidden`: remat, unroll, and a key for dropout.
        """

    def evaluate(self, model: Neo, params: Params, batch: Any) -> Sums:
        """Returns the sums of a batch that is held out, without what only guides training."""
