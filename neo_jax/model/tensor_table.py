"""The name table: the name and the layout of every parameter, here and in other formats.

One row a tensor, one column a format. Kernels differ in layout, not only in name: ours keep heads
and head_dim apart and put the axes that a product sums over last. Others store matrices: [outputs,
inputs] too where `torch.nn.Linear` made them, and in Flax's GPT-2, else [inputs, outputs]; and
GPT-2 has q, k and v in one. Both ways between them are views, never copies. The tables of tokens
have rows of zeros beyond the vocabulary here only.
"""

import dataclasses
import functools
import math
from typing import Literal, TypeVar

import numpy as np

from neo_jax.axes import EMBED, FEATURES, HEAD_DIM, HEADS, LABELS, MLP, POSITIONS, VOCAB, Array
from neo_jax.config import ModelConfig

AnyArray = TypeVar("AnyArray", np.ndarray, Array)
Format = Literal["hf", "flax", "mesh_tf"]
"""Hugging Face's checkpoints for PyTorch, those for Flax, and EleutherAI/gpt-neo's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a format keeps a parameter: in a tensor of its own, or in a part of one."""

    name: str
    shape: tuple[int, ...]  # of the part
    order: tuple[int, ...]  # of our axes; it joins some
    part: int = 0
    parts: int = 1
    axis: int = 0  # along which the parts follow each other

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the tensor with all its parts."""
        return tuple(n * self.parts if i == self.axis else n for i, n in enumerate(self.shape))


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter: its place in the canonical tree, and its name and layout elsewhere."""

    path: tuple[str, ...]  # keys of the nested dictionaries, ("h_0", "attn", "q_proj", "kernel")
    axes: tuple[str, ...]  # logical axes, one a dimension
    shape: tuple[int, ...]  # as the canonical tree holds it
    stored_shape: tuple[int, ...]  # the same without the padding of the vocabulary
    num_inputs: int  # axes at the end that a product sums over; 0 for what is no kernel
    places: dict[Format, Place]  # GPT-2 has none in Mesh-TensorFlow

    @property
    def hf_name(self) -> str:
        """The name in a checkpoint of Hugging Face's for PyTorch."""
        return self.places["hf"].name

    def to(self, form: Format, array: AnyArray) -> AnyArray:
        """Returns `array`, of `shape`, as a view in the format's layout: a part of its tensor."""
        place = self.places[form]
        return array[: self.stored_shape[0]].transpose(place.order).reshape(place.shape)

    def of(self, form: Format, array: AnyArray) -> AnyArray:
        """Returns what a tensor of the format holds of this one, as a view of `stored_shape`."""
        place = self.places[form]
        start, size = place.part * place.shape[place.axis], place.shape[place.axis]
        array = array[(slice(None),) * place.axis + (slice(start, start + size),)]
        back = tuple(place.order.index(axis) for axis in range(len(place.order)))
        return array.reshape([self.stored_shape[axis] for axis in place.order]).transpose(back)


@functools.lru_cache(maxsize=8)
def tensors(config: ModelConfig) -> tuple[Tensor, ...]:
    """Returns the row of every parameter, from the embeddings to the last norm and the head.

    Parts of one tensor follow each other in their order.
    """
    rows = [_row(config, *entry) for entry in _EMBEDDINGS]
    for i in range(config.num_layers):
        for entry in _LAYER:
            if config.qkv_bias or entry[0] not in _QKV_BIASES:
                rows.append(_row(config, *entry, layer=i))
    rows += [_row(config, *entry) for entry in _FINAL_NORM]
    return (*rows, *(_row(config, *entry, is_head=True) for entry in _heads(config)))


def _heads(config: ModelConfig) -> list["_Entry"]:
    """Returns the entries of what stands on the last norm and is no part of the model below."""
    if not config.head.is_classifier:
        return [] if config.tied_head else [_HEAD]
    kernel = (f"{config.head.kind}/kernel", (LABELS, FEATURES), 1)
    return (
        [kernel, (f"{config.head.kind}/bias", (LABELS,), 0)] if config.head.has_bias else [kernel]
    )


def _row(
    config: ModelConfig,
    path: str,
    axes: tuple[str, ...],
    num_inputs: int,
    *,
    layer: int | None = None,
    is_head: bool = False,
) -> Tensor:
    stored = tuple(map(config.size, axes))
    shape = tuple(
        config.padded_vocab_size if axis == VOCAB else size
        for axis, size in zip(axes, stored, strict=True)
    )
    family = config.family
    module, _, kind = path.rpartition("/")
    found = family.modules.get(module, module.replace("/", "."))
    theirs, part = found if isinstance(found, tuple) else (found, None)
    hf = f"{theirs}.{'bias' if kind == 'bias' else 'weight'}"
    mesh_tf = family.mesh_tf.get(path)
    if layer is not None:
        path, hf, mesh_tf = f"h_{layer}/{path}", f"h.{layer}.{hf}", f"h{layer}/{mesh_tf}"
    hf = hf if is_head else f"transformer.{hf}"
    kernel, table = bool(num_inputs), kind == "embedding"

    def place(name: str, transposed: bool) -> Place:
        order = tuple(range(len(axes)))
        sizes: tuple[int, ...] = (math.prod(stored),)
        if kernel or table:
            outputs = len(axes) - num_inputs if kernel else 1
            sizes = (math.prod(stored[:outputs]), math.prod(stored[outputs:]))
            if transposed:
                order, sizes = order[outputs:] + order[:outputs], sizes[::-1]
        if part is None:
            return Place(name, sizes, order)
        return Place(name, sizes, order, part, 3, int(kernel and transposed))

    places: dict[Format, Place] = {
        "hf": place(hf, transposed=kernel and family.transposed and not is_head),
        # It calls matrices and scales as we do.
        "flax": place(
            "/".join([*hf.split(".")[:-1], "kernel" if is_head else kind]),
            transposed=is_head or (kernel and not family.transposed),
        ),
    }
    if family.mesh_tf and not is_head:
        places["mesh_tf"] = place(f"gpt2/{mesh_tf}", transposed=kernel)
    return Tensor(tuple(path.split("/")), axes, shape, stored, num_inputs, places)


# Our path, logical axes, and for kernels how many of these are inputs.
_Entry = tuple[str, tuple[str, ...], int]
_EMBEDDINGS: tuple[_Entry, ...] = (
    ("wte/embedding", (VOCAB, EMBED), 0),
    ("wpe/embedding", (POSITIONS, EMBED), 0),
)
_LAYER: tuple[_Entry, ...] = (
    ("ln_1/scale", (EMBED,), 0),
    ("ln_1/bias", (EMBED,), 0),
    ("attn/q_proj/kernel", (HEADS, HEAD_DIM, EMBED), 1),
    ("attn/k_proj/kernel", (HEADS, HEAD_DIM, EMBED), 1),
    ("attn/v_proj/kernel", (HEADS, HEAD_DIM, EMBED), 1),
    ("attn/q_proj/bias", (HEADS, HEAD_DIM), 0),
    ("attn/k_proj/bias", (HEADS, HEAD_DIM), 0),
    ("attn/v_proj/bias", (HEADS, HEAD_DIM), 0),
    ("attn/out_proj/kernel", (EMBED, HEADS, HEAD_DIM), 2),
    ("attn/out_proj/bias", (EMBED,), 0),
    ("ln_2/scale", (EMBED,), 0),
    ("ln_2/bias", (EMBED,), 0),
    ("mlp/c_fc/kernel", (MLP, EMBED), 1),
    ("mlp/c_fc/bias", (MLP,), 0),
    ("mlp/c_proj/kernel", (EMBED, MLP), 1),
    ("mlp/c_proj/bias", (EMBED,), 0),
)
_QKV_BIASES = ("attn/q_proj/bias", "attn/k_proj/bias", "attn/v_proj/bias")
_FINAL_NORM: tuple[_Entry, ...] = (("ln_f/scale", (EMBED,), 0), ("ln_f/bias", (EMBED,), 0))
_HEAD: _Entry = ("lm_head/embedding", (VOCAB, EMBED), 0)

KERNELS = tuple(path.split("/")[-2] for path, _, inputs, *_ in _LAYER if inputs)
"""The names of the linear maps of a layer."""
