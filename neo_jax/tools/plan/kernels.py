"""What the blocks of attention's kernel `splash` take, beyond the products of what is seen.

A block of logits is formed whole if any of it is seen, and for each the kernel reads the keys and
values of its columns.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from neo_jax.config import ModelConfig
from neo_jax.model.flops import visible_keys
from neo_jax.ops.attention.splash import LANES, block_size
from neo_jax.tools.plan.flops import SPLASH, compiled_flops
from neo_jax.tools.plan.hlo import Instruction, sizes

LOGIT_OPS = 12
"""Operations on a logit in each kernel: to mask it (4: two comparisons, their and, a choice), the
largest of its row, a difference, the exponential (4), a sum, a cast; backward about the same, with
a difference and a product in the place of the largest and the sum."""


class Blocks(NamedTuple):
    """Of a head and a sequence, on average over layers."""

    logits: float  # that are formed
    keys: float  # that are read, each as often as a block needs it


def blocks(windows: Sequence[int | None], length: int, largest: int = 0) -> Blocks:
    """Returns what blocks take in layers of these windows.

    `largest` is the side of the blocks where the window is no smaller; 0 is what we take.
    """
    logits, keys = 0, 0
    for window in windows:
        filled = length + -length % LANES
        side = block_size(filled, window, largest) if largest else block_size(filled, window)
        reach = filled if window is None else window - 1  # to the left, of a block's first query
        number = sum(row + 1 - max(row * side - reach, 0) // side for row in range(filled // side))
        logits, keys = logits + number * side**2, keys + number * side
    return Blocks(logits / len(windows), keys / len(windows))


class Extras(NamedTuple):
    """What a call of a kernel does next to products of what is seen, on a device."""

    hidden_flops: float = 0.0  # products in its blocks with keys that are hidden
    vector_ops: float = 0.0  # on logits
    memory_bytes: float = 0.0  # of keys and values that are read again


def extras(
    each: Instruction,
    lines: Mapping[str, Instruction],
    config: ModelConfig | None,
    largest: int = 0,
) -> Extras:
    """Returns what a call of the kernel does beyond what is seen; of other instructions nothing."""
    if config is None or each.opcode != "custom-call" or not re.match(SPLASH, each.name):
        return Extras()
    flops = compiled_flops(each, lines, config)
    shapes = [lines[name].shape for name in each.operands]
    queries = max((sizes(shape) for shape in shapes if not shape.startswith("(")), key=len)
    *rows, length, head_dim = queries
    windows = [config.window(layer) for layer in range(config.num_layers)]
    formed, seen = blocks(windows, length, largest), visible_keys(config, length) / len(windows)
    again = max(formed.keys - length, 0)
    return Extras(
        flops * (formed.logits / seen - 1),
        LOGIT_OPS * math.prod(rows) * formed.logits,
        math.prod(rows) * again * kv_bytes(head_dim),
    )


def kv_bytes(head_dim: int) -> int:
    """Returns the bytes of a key and a value of a head, in bfloat16."""
    return 2 * 2 * head_dim


def block_side(kernel: str) -> int:
    """Returns the largest side of the blocks of a kernel, 0 where its name says none."""
    return int(kernel.partition("-")[2] or 0)
