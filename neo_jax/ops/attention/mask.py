"""Which key a query sees, by positions: one formula for prefill, decoding and training."""

import dataclasses

import jax

from neo_jax.axes import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """A specification, not an array: kernels that skip blocks never form the array.

    A key is visible iff 0 <= key position <= query position, and, in a local layer, query
    position - key position < window: `window` keys, the query's own included. Position -1 marks
    what is not there: padding, or an empty slot of a cache. With `segment_starts` a query sees no
    key before its start: in a row of several documents, what came before its own.

    An aligned mask is that of a sequence, or of the end of one, that attends to itself: the last
    query and the last key are one token, and so on before them. Its positions are 0, 1, 2, ..., or,
    with `segment_starts`, run on without gaps; and all tokens of a document have its start. So
    kernels that know only indices can serve it.
    """

    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    segment_starts: Int[Array, "B T"] | None = None  # the first position that a query may see
    k_segment_starts: Int[Array, "B S"] | None = None  # of each key, where there are more of them

    def visible(self) -> Bool[Array, "B T S"]:
        """Returns the mask as an array, True where the query sees the key."""
        q = self.q_positions[:, :, None]
        k = self.k_positions[:, None, :]
        seen = (k >= 0) & (k <= q)
        if self.window is not None:
            seen &= q - k < self.window
        if self.segment_starts is not None:
            seen &= k >= self.segment_starts[:, :, None]
        return seen

    def block(self, queries: slice, keys: slice) -> "Mask":
        """Returns the mask of some queries and some keys."""
        segment_starts = None if self.segment_starts is None else self.segment_starts[:, queries]
        positions = self.q_positions[:, queries], self.k_positions[:, keys]
        return Mask(*positions, self.window, segment_starts=segment_starts)
