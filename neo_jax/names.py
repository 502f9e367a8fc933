"""The name table: what every parameter is called here and in other formats, and how it lies there.

One row a tensor. Kernels differ in layout, not only in name: ours keep heads and head_dim apart
and put the axes that a product sums over first, so that an einsum equation reads off the shape;
Hugging Face stores the matrix [outputs, inputs] of `torch.nn.Linear`. Both ways between them are
views, never copies. The embedding of tokens has rows of zeros beyond the vocabulary here only.
"""

import dataclasses
import math
from typing import TypeVar

import numpy as np

from neo_jax.axes import EMBED, HEAD_DIM, HEADS, MLP, POSITIONS, VOCAB, Array
from neo_jax.config import ModelConfig

AnyArray = TypeVar("AnyArray", np.ndarray, Array)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One parameter: its place in the canonical tree, and its name and layout elsewhere."""

    path: tuple[str, ...]  # keys of the nested dictionaries, ("h_0", "attn", "q_proj", "kernel")
    axes: tuple[str, ...]  # logical axes, one a dimension
    shape: tuple[int, ...]  # as the canonical tree holds it
    stored_shape: tuple[int, ...]  # the same without the padding of the vocabulary
    num_inputs: int  # leading axes that a product sums over; 0 for what is no kernel
    hf_name: str

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape under `hf_name`: [outputs, inputs] for kernels, ours for all others."""
        if not self.num_inputs:
            return self.stored_shape
        inputs, outputs = self.shape[: self.num_inputs], self.shape[self.num_inputs :]
        return (math.prod(outputs), math.prod(inputs))

    def to_hf(self, array: AnyArray) -> AnyArray:
        """Returns `array`, of `shape`, as a view of `hf_shape`."""
        trimmed = array[: self.stored_shape[0]]
        return trimmed.transpose(self._outputs_first).reshape(self.hf_shape)

    def from_hf(self, array: AnyArray) -> AnyArray:
        """Returns `array`, of `hf_shape`, as a view of `stored_shape`."""
        order = self._outputs_first
        back = tuple(order.index(axis) for axis in range(len(order)))
        return array.reshape([self.stored_shape[axis] for axis in order]).transpose(back)

    @property
    def _outputs_first(self) -> tuple[int, ...]:
        axes = tuple(range(len(self.shape)))
        return axes[self.num_inputs :] + axes[: self.num_inputs]


def tensors(config: ModelConfig) -> list[Tensor]:
    """Returns the row of every parameter, from the embeddings to the last norm."""
    rows = [_row(config, *entry) for entry in _EMBEDDINGS]
    for i in range(config.num_layers):
        rows += [
            _row(config, f"h_{i}/{ours}", f"h.{i}.{theirs}", *layout)
            for ours, theirs, *layout in _LAYER
        ]
    return rows + [_row(config, *entry) for entry in _FINAL_NORM]


def _row(config: ModelConfig, path: str, hf_name: str, axes: tuple, num_inputs: int = 0) -> Tensor:
    stored = tuple(getattr(config, _SIZES[axis]) for axis in axes)
    shape = tuple(
        config.padded_vocab_size if axis == VOCAB else size
        for axis, size in zip(axes, stored, strict=True)
    )
    return Tensor(tuple(path.split("/")), axes, shape, stored, num_inputs, f"transformer.{hf_name}")


_SIZES = {
    EMBED: "embed_dim",
    HEADS: "num_heads",
    HEAD_DIM: "head_dim",
    MLP: "mlp_dim",
    VOCAB: "vocab_size",
    POSITIONS: "max_length",
}

# Our path, Hugging Face's name, logical axes, and for kernels how many of these are inputs.
_EMBEDDINGS = (
    ("wte/embedding", "wte.weight", (VOCAB, EMBED)),
    ("wpe/embedding", "wpe.weight", (POSITIONS, EMBED)),
)
_LAYER = (
    ("ln_1/scale", "ln_1.weight", (EMBED,)),
    ("ln_1/bias", "ln_1.bias", (EMBED,)),
    ("attn/q_proj/kernel", "attn.attention.q_proj.weight", (EMBED, HEADS, HEAD_DIM), 1),
    ("attn/k_proj/kernel", "attn.attention.k_proj.weight", (EMBED, HEADS, HEAD_DIM), 1),
    ("attn/v_proj/kernel", "attn.attention.v_proj.weight", (EMBED, HEADS, HEAD_DIM), 1),
    ("attn/out_proj/kernel", "attn.attention.out_proj.weight", (HEADS, HEAD_DIM, EMBED), 2),
    ("attn/out_proj/bias", "attn.attention.out_proj.bias", (EMBED,)),
    ("ln_2/scale", "ln_2.weight", (EMBED,)),
    ("ln_2/bias", "ln_2.bias", (EMBED,)),
    ("mlp/c_fc/kernel", "mlp.c_fc.weight", (EMBED, MLP), 1),
    ("mlp/c_fc/bias", "mlp.c_fc.bias", (MLP,)),
    ("mlp/c_proj/kernel", "mlp.c_proj.weight", (MLP, EMBED), 1),
    ("mlp/c_proj/bias", "mlp.c_proj.bias", (EMBED,)),
)
KERNELS = tuple(path.split("/")[-2] for path, _, _, *inputs in _LAYER if inputs)
"""The names of the linear maps of a layer."""

_FINAL_NORM = (
    ("ln_f/scale", "ln_f.weight", (EMBED,)),
    ("ln_f/bias", "ln_f.bias", (EMBED,)),
)
