"""A training step on paper: what each instruction of it takes, without a program.

For the plans of many meshes, and for models whose blocks are not here. A block's products are
counted as in `neo_jax.model.flops`; what else moves through memory is counted in passes over the
residual stream, over the MLP's hidden layer and over queries and keys, named below.
"""

import dataclasses
from collections.abc import Sequence

from neo_jax.config import ModelConfig
from neo_jax.tools.plan.collectives import Traffic
from neo_jax.tools.plan.hlo_cost import Work
from neo_jax.tools.plan.kernels import LOGIT_OPS, blocks, kv_bytes
from neo_jax.tools.plan.predict import Phase

PARTS = ("qkv", "attention", "out", "up", "down", "rest")
"""What a layer does: products with four weights, attention, and what only moves memory."""

# Passes over the residual stream, forward: a norm reads twice, for its statistics and to apply
# them, and writes; each of two branches ends with an addition, which reads two and writes one.
_NORM, _ADDITION = 3, 3
_BRANCHES = 2
_BACKWARD = 2  # times as many passes backward: a value and its gradient
_LOGIT_PASSES = 5  # over logits in float32: written, read for the sum, the loss, its gradient twice
_STATE_PASSES = 7  # over float32 of a parameter: it, its gradient, two moments; three are written
_BYTES = 2  # of bfloat16


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a model, of one that is not here too."""

    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    vocab_size: int
    kv_heads: int = 0  # 0 is as many as heads
    gated: bool = False  # whether the MLP has a third weight, whose output multiplies
    parallel: bool = False  # whether attention and MLP read one norm, and one addition adds both
    rotary: bool = False  # whether positions turn queries and keys
    tied_head: bool = True
    writes: bool = True  # whether it has logits of tokens, as a classifier has not
    windows: tuple[int | None, ...] = (None,)  # a unit, repeated in depth: keys that a query sees

    @property
    def kv_width(self) -> int:
        """Of keys."""
        return (self.kv_heads or self.num_heads) * self.head_dim

    @property
    def width(self) -> int:
        """Of queries."""
        return self.num_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Parameters of a layer that multiply."""
        attention = self.embed_dim * (2 * self.width + 2 * self.kv_width)
        return attention + (3 if self.gated else 2) * self.embed_dim * self.mlp_dim

    @property
    def params(self) -> int:
        """Parameters of the model, but for those of norms, biases and positions."""
        tables = 1 if self.tied_head else 2
        return self.num_layers * self.layer_params + tables * self.vocab_size * self.embed_dim

    def flops_per_token(self, length: int, seen: float = 0.5) -> float:
        """Returns what training needs: `seen` is the share of all pairs that attention counts."""
        pairs = seen * length * self.width * self.num_layers
        return 6 * self.params + 12 * pairs


def shape_of(config: ModelConfig) -> Shape:
    """Returns the shape of a model of ours."""
    return Shape(
        config.num_layers, config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim,
        config.padded_vocab_size, tied_head=config.tied_head,
        writes=not config.head.is_classifier,
        windows=tuple(config.window(i) for i in range(len(config.attention_types))),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a step is split over devices, and what it computes again."""

    rows: float  # sequences of a device at a time; those that devices share by `model` count once
    length: int
    data: int = 1
    fsdp: int = 1
    model: int = 1
    context: int = 1
    slices: int = 1  # joined by the network; `data` or `fsdp` counts devices of one of them
    accumulation: int = 1
    again: Sequence[str] = ()  # of PARTS, what the backward pass computes again
    side: int = 0  # of the blocks of attention, 0 as our kernel takes; negative: logits in memory
    frozen: bool = False  # whether weights get no gradient, as where adapters are trained
    fused: bool = False  # whether one kernel forms all gradients of attention
    sum_bytes: int = 4  # of an element of a sum that devices form together
    links: float = 2.0  # by which a device sends weights at a time
    model_links: float = 2.0  # and activations


def again(remat: str, shape: Shape) -> tuple[str, ...]:
    """Returns what is computed again: of a layer never what only its output needs."""
    if remat == "none":
        return ()
    if remat == "products":
        return ("attention", "rest")
    return tuple(part for part in PARTS if part not in _last(shape))


def _last(shape: Shape) -> tuple[str, ...]:
    return ("out", "down") if shape.parallel else ("down",)


def phases(shape: Shape, setup: Setup) -> list[Phase]:
    """Returns the phases of a training step: layers forward and backward, and the rest."""
    repeats = shape.num_layers * setup.accumulation
    forward, backward = _forward(shape, setup), _backward(shape, setup)
    for part in setup.again:
        backward = [*backward, *forward[part]]
    ahead = [work for works in forward.values() for work in works]
    gather, scatter = _gather(shape, setup), _scatter(shape, setup)
    sums = _sum(shape, setup)
    branches = 1 if shape.parallel else _BRANCHES
    summed_again = "out" in setup.again and not shape.parallel
    exchanged = _exchange(shape, setup)
    return [
        Phase(
            [(repeats, work) for work in ahead],
            [_times(row, repeats) for row in (gather, *[sums] * branches, exchanged)],
        ),
        Phase(
            [(repeats, work) for work in backward],
            [
                _times(row, repeats)
                for row in (gather, scatter, *[sums] * (branches + summed_again)) + (exchanged,) * 2
            ],
        ),
        _rest(shape, setup),
    ]


def _times(row: Traffic, times: int) -> Traffic:
    return row._replace(times=row.times * times, wire_bytes=row.wire_bytes * times)


def _tokens(setup: Setup) -> float:
    """Returns the tokens that a device multiplies with its part of the weights."""
    return setup.rows * setup.length / setup.context


def _product(tokens: float, width: float, result: float) -> Work:
    moved = tokens * width + width * result + tokens * result
    return Work(2 * tokens * width * result, _BYTES * moved)


def _forward(shape: Shape, setup: Setup) -> dict[str, list[Work]]:
    """Returns the instructions of a layer, by PARTS."""
    tokens, split = _tokens(setup), setup.model
    embed, mlp = shape.embed_dim, shape.mlp_dim / split
    heads, keys = shape.width / split, shape.kv_width / split
    hidden = tokens * mlp * (3 if shape.gated else 2)  # the activation reads and writes
    return {
        "qkv": [_product(tokens, embed, heads + 2 * keys)],
        "attention": _attention(shape, setup, products=(2,)),
        "out": [_product(tokens, heads, embed)],
        "up": [_product(tokens, embed, mlp)] * (2 if shape.gated else 1),
        "down": [_product(tokens, mlp, embed)],
        "rest": [
            Work(0, _BYTES * (_stream(shape, tokens) + hidden + _turned(shape, tokens / split)))
        ],
    }


def _stream(shape: Shape, tokens: float) -> float:
    """Returns the elements of the residual stream that a layer moves forward."""
    norms = 1 if shape.parallel else _BRANCHES
    return tokens * shape.embed_dim * (_NORM * norms + _ADDITION * _BRANCHES)


def _turned(shape: Shape, tokens: float) -> float:
    return 2 * tokens * (shape.width + shape.kv_width) if shape.rotary else 0.0


def _backward(shape: Shape, setup: Setup) -> list[Work]:
    """Returns the instructions of a layer backward, but for what is computed again."""
    forward, tokens = _forward(shape, setup), _tokens(setup)
    products = [work for part in ("qkv", "out", "up", "down") for work in forward[part]]
    products *= 1 if setup.frozen else 2
    hidden = tokens * shape.mlp_dim / setup.model * (5 if shape.gated else 3)
    stream = _BACKWARD * _stream(shape, tokens)
    rest = Work(0, _BYTES * (stream + hidden + _turned(shape, tokens / setup.model)))
    kernels = (5,) if setup.fused else (3, 4)  # one for the gradient of queries, one for others
    return [*products, *_attention(shape, setup, kernels), rest]


def _attention(shape: Shape, setup: Setup, products: Sequence[int]) -> list[Work]:
    """Returns the instructions of attention: kernels that form so many products each."""
    rows = setup.rows * shape.num_heads / setup.model / setup.context
    if setup.side >= 0:
        formed = blocks(shape.windows, setup.length, setup.side)
        flops = 2 * rows * formed.logits * shape.head_dim
        moved = rows * (formed.keys + setup.length) * kv_bytes(shape.head_dim)
        vector_ops = LOGIT_OPS * rows * formed.logits
        return [Work(number * flops, moved, vector_ops=vector_ops) for number in products]
    logits = rows * setup.length**2
    backward = products != (2,)
    product = Work(2 * logits * shape.head_dim, _BYTES * logits)
    softmax = Work(0, _BYTES * logits * 3)  # read twice and written, or two read and one written
    return [product] * (4 if backward else 2) + [softmax]


def _gather(shape: Shape, setup: Setup) -> Traffic:
    """Returns the collective that brings a layer's weights together, in bfloat16."""
    among = setup.fsdp * setup.context
    size = _BYTES * shape.layer_params / setup.model * (among - 1) / among
    return Traffic("all-gather", ("fsdp",), 1, round(size), links=setup.links)


def _scatter(shape: Shape, setup: Setup) -> Traffic:
    gathered = _gather(shape, setup)
    size = 0 if setup.frozen else gathered.wire_bytes * setup.sum_bytes // _BYTES
    return gathered._replace(kind="reduce-scatter", wire_bytes=size)


def _sum(shape: Shape, setup: Setup) -> Traffic:
    """Returns the sum of what the devices along `model` have of a branch's output."""
    part = (setup.model - 1) / setup.model
    size = 2 * setup.sum_bytes * _tokens(setup) * shape.embed_dim * part
    return Traffic("all-reduce", ("model",), 1, round(size), links=setup.model_links)


def _exchange(shape: Shape, setup: Setup) -> Traffic:
    """Returns what brings keys and values together where devices share a sequence.

    All of them where a query sees all, and else those of a window, from the neighbours.
    """
    among = setup.context
    if among == 1:
        return Traffic("all-gather", ("context",), 0, 0)
    whole = (among - 1) / among * setup.length
    seen = [whole if each is None else min(each - 1, whole) for each in shape.windows]
    keys = 2 * setup.rows * shape.kv_width / setup.model * sum(seen) / len(seen)
    return Traffic("all-gather", ("context",), 1, round(_BYTES * keys))


def _rest(shape: Shape, setup: Setup) -> Phase:
    """Returns embedding, head and loss, the sums of gradients along `data`, and the optimizer."""
    tokens, split = _tokens(setup), setup.model
    table = shape.vocab_size * shape.embed_dim / split
    logits = tokens * shape.vocab_size / split
    repeats = setup.accumulation if shape.writes else 0
    head = _product(tokens, shape.embed_dim, shape.vocab_size / split)
    among = setup.fsdp * setup.context
    held = 0.0 if setup.frozen else shape.params / split / among  # what is trained
    part = (among - 1) / among
    tables = 1 if shape.tied_head else 2
    summed_bytes = 0 if setup.frozen else setup.sum_bytes
    sent = round(tables * table * part * (2 * _BYTES + summed_bytes))
    summed = round(2 * 4 * held * (setup.data - 1) / setup.data)
    between = round(2 * 4 * held * (setup.slices - 1) / setup.slices)
    return Phase(
        [
            *[(repeats, head)] * (2 if setup.frozen else 3),
            (repeats, Work(0, _LOGIT_PASSES * 4 * logits)),
            (1, Work(0, _STATE_PASSES * 4 * held)),
        ],
        [
            Traffic("all-gather", ("fsdp",), 3, sent, links=setup.links),
            Traffic("all-reduce", ("data",), 1, summed),
            Traffic("all-reduce", ("data",), 1, between, between_slices=True),
        ],
    )
