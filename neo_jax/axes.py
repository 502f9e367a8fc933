"""The vocabulary: one name and one letter for every axis, in the whole package.

The letters appear in einsum equations and array annotations, the names in the annotation that
every parameter carries, in sharding rules and on the command line, the fields in `ModelConfig`.

| letter | logical axis | config field | meaning                        |
|--------|--------------|--------------|--------------------------------|
| B      | batch        |              | sequences                      |
| T      | length       |              | queries, tokens of a sequence  |
| S      | kv_length    |              | keys, slots of a cache         |
| D      | embed        | embed_dim    | width of the residual stream   |
| N      | heads        | num_heads    | attention heads                |
| H      | head_dim     | head_dim     | width of a head                |
| F      | mlp          | mlp_dim      | hidden width of the MLP        |
| V      | vocab        | vocab_size   | tokens of the vocabulary       |
| Vp     |              |              | the same, padded for any mesh  |
| P      | positions    | max_length   | learned positions, the context |
| L      | layers       | num_layers   | blocks                         |
| C      | labels       | head.labels  | labels of a classifier         |
| W      |              | window_size  | keys that a local layer sees   |

Array annotations name the axes by these letters: `Float[Array, "B T D"]`.
"""

from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, UInt

BATCH = "batch"
LENGTH = "length"
KV_LENGTH = "kv_length"
EMBED = "embed"
HEADS = "heads"
HEAD_DIM = "head_dim"
MLP = "mlp"
VOCAB = "vocab"
POSITIONS = "positions"
LAYERS = "layers"
LABELS, VIRTUAL, FEATURES = "labels", "virtual", "features"

LOGICAL_AXES = (BATCH, LENGTH, KV_LENGTH, EMBED, HEADS, HEAD_DIM, MLP, VOCAB, POSITIONS)
"""Those that a mesh can split; layers come one after another, and a classifier's head, of labels by
features, and a soft prompt, of virtual tokens by features, are small: every device has them."""

Params = dict[str, Any]
"""The canonical parameter tree: nested dictionaries, one sub-tree a layer, arrays at the leaves."""

__all__ = [
    "BATCH", "EMBED", "FEATURES", "HEADS", "HEAD_DIM", "KV_LENGTH", "LABELS", "LAYERS", "LENGTH",
    "LOGICAL_AXES", "MLP", "POSITIONS", "VIRTUAL", "VOCAB", "Array", "Bool", "Float", "Int",
    "Params", "UInt",
]  # fmt: skip
