"""The name table: what every parameter is called here and in other formats, and how it lies there.

One row a tensor, one column a format. Kernels differ in layout, not only in name: ours keep heads
and head_dim apart and put the axes that a product sums over last. Others store matrices: [outputs,
inputs] too where `torch.nn.Linear` made them, and in Flax's GPT-2, else [inputs, outputs]; and
GPT-2 has q, k and v in one. Both ways between them are views, never copies. The tables of tokens
have rows of zeros beyond the vocabulary here only.
"""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar

import numpy as np

from neo_jax.axes import EMBED, HEAD_DIM, HEADS, MLP, POSITIONS, VOCAB, Array
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
        """Returns `array`, of `shape`, as a view that lies as the format has it: a part of what."""
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
        for path, axes, inputs, *names in _LAYER:
            if config.qkv_bias or path not in _QKV_BIASES:
                rows.append(_row(config, f"h_{i}/{path}", axes, inputs, *names, layer=i))
    rows += [_row(config, *entry) for entry in _FINAL_NORM]
    return tuple(rows if config.tied_head else [*rows, _row(config, *_HEAD)])


def _row(
    config: ModelConfig,
    path: str,
    axes: tuple[str, ...],
    num_inputs: int,
    gpt_neo: str,
    gpt2: str | tuple[str, int],
    mesh_tf: str,
    *,
    layer: int | None = None,
) -> Tensor:
    stored = tuple(map(config.size, axes))
    shape = tuple(
        config.padded_vocab_size if axis == VOCAB else size
        for axis, size in zip(axes, stored, strict=True)
    )
    is_gpt2 = config.family == "gpt2"
    hf, part = (gpt2 if isinstance(gpt2, tuple) else (gpt2, None)) if is_gpt2 else (gpt_neo, None)
    if layer is not None:
        hf, mesh_tf = f"h.{layer}.{hf}", f"h{layer}/{mesh_tf}"
    hf = f"transformer.{hf}" if path != _HEAD[0] else hf
    kernel, table = bool(num_inputs), path.endswith("embedding")

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
        "hf": place(hf, transposed=kernel and is_gpt2),
        "flax": place(_flax(hf, path), transposed=(kernel and not is_gpt2) or path == _HEAD[0]),
    }
    if mesh_tf and not is_gpt2:
        places["mesh_tf"] = place(f"gpt2/{mesh_tf}", transposed=kernel)
    return Tensor(tuple(path.split("/")), axes, shape, stored, num_inputs, places)


def _flax(hf: str, path: str) -> str:
    """Returns the name in a checkpoint for Flax: it calls matrices and scales as we do."""
    *modules, last = hf.split(".")
    if last == "weight":
        last = "kernel" if path == _HEAD[0] else path.rpartition("/")[2]
    return "/".join((*modules, last))


# Our path, logical axes, for kernels how many of these are inputs; the names in Hugging Face's
# GPT-Neo and GPT-2, there with the number of the part where q, k and v are one; in Mesh-TensorFlow.
_EMBEDDINGS: tuple[Any, ...] = (
    ("wte/embedding", (VOCAB, EMBED), 0, "wte.weight", "wte.weight", "wte"),
    ("wpe/embedding", (POSITIONS, EMBED), 0, "wpe.weight", "wpe.weight", "wpe"),
)
_SPLIT = (HEADS, HEAD_DIM, EMBED)
_LAYER: tuple[Any, ...] = (
    ("ln_1/scale", (EMBED,), 0, "ln_1.weight", "ln_1.weight", "norm_1/g"),
    ("ln_1/bias", (EMBED,), 0, "ln_1.bias", "ln_1.bias", "norm_1/b"),
    ("attn/q_proj/kernel", _SPLIT, 1, "attn.attention.q_proj.weight", ("attn.c_attn.weight", 0),
     "attn/q"),
    ("attn/k_proj/kernel", _SPLIT, 1, "attn.attention.k_proj.weight", ("attn.c_attn.weight", 1),
     "attn/k"),
    ("attn/v_proj/kernel", _SPLIT, 1, "attn.attention.v_proj.weight", ("attn.c_attn.weight", 2),
     "attn/v"),
    ("attn/q_proj/bias", (HEADS, HEAD_DIM), 0, "", ("attn.c_attn.bias", 0), ""),
    ("attn/k_proj/bias", (HEADS, HEAD_DIM), 0, "", ("attn.c_attn.bias", 1), ""),
    ("attn/v_proj/bias", (HEADS, HEAD_DIM), 0, "", ("attn.c_attn.bias", 2), ""),
    ("attn/out_proj/kernel", (EMBED, HEADS, HEAD_DIM), 2, "attn.attention.out_proj.weight",
     "attn.c_proj.weight", "attn/o"),
    ("attn/out_proj/bias", (EMBED,), 0, "attn.attention.out_proj.bias", "attn.c_proj.bias",
     "attn/compute_output_bias/o_b"),
    ("ln_2/scale", (EMBED,), 0, "ln_2.weight", "ln_2.weight", "norm_2/g"),
    ("ln_2/bias", (EMBED,), 0, "ln_2.bias", "ln_2.bias", "norm_2/b"),
    ("mlp/c_fc/kernel", (MLP, EMBED), 1, "mlp.c_fc.weight", "mlp.c_fc.weight",
     "mlp/conv1d_main/c_fc/kernel"),
    ("mlp/c_fc/bias", (MLP,), 0, "mlp.c_fc.bias", "mlp.c_fc.bias", "mlp/conv1d_main/c_fc/bias"),
    ("mlp/c_proj/kernel", (EMBED, MLP), 1, "mlp.c_proj.weight", "mlp.c_proj.weight",
     "mlp/conv1d_main/c_proj/kernel"),
    ("mlp/c_proj/bias", (EMBED,), 0, "mlp.c_proj.bias", "mlp.c_proj.bias",
     "mlp/conv1d_main/c_proj/bias"),
)  # fmt: skip
_QKV_BIASES = ("attn/q_proj/bias", "attn/k_proj/bias", "attn/v_proj/bias")
_FINAL_NORM: tuple[Any, ...] = (
    ("ln_f/scale", (EMBED,), 0, "ln_f.weight", "ln_f.weight", "ln_f/g"),
    ("ln_f/bias", (EMBED,), 0, "ln_f.bias", "ln_f.bias", "ln_f/b"),
)
_HEAD: Any = ("lm_head/embedding", (VOCAB, EMBED), 0, "lm_head.weight", "lm_head.weight", "")

KERNELS = tuple(path.split("/")[-2] for path, _, inputs, *_ in _LAYER if inputs)
"""The names of the linear maps of a layer."""
