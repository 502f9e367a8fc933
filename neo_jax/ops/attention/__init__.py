"""Attention by several implementations of one signature, `attend(q, k, v, mask)`.

| name    | what                                                     | "auto" takes it for         |
|---------|----------------------------------------------------------|-----------------------------|
| dense   | every query against every key; the plain one, the oracle | decoding                    |
| single  | one query against every key                              | a step of it, on a CPU      |
| blocked | blocks of queries against the keys that they can see     | whole sequences             |
| splash  | a TPU kernel, in blocks of up to 512 x 512 logits        | the same, bfloat16 on a TPU |
| cudnn   | an NVIDIA kernel                                         | the same, 16 bits on a GPU  |

`splash-256` and `splash-1024` are splash with blocks of up to 256 or 1024; `neo-jax plan --search`
tells which suits a shape. Where the rules split sequences, `context` brings together what a
device's queries see.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from neo_jax.axes import BATCH, HEADS, Array, Float
from neo_jax.config import Kernel
from neo_jax.devices.chips import BFLOAT16_CAPABILITY, OLD_TPUS, compute_capability
from neo_jax.errors import NeoError, suggest
from neo_jax.ops.attention.blocked import blocked
from neo_jax.ops.attention.context import attend_split, context_axes
from neo_jax.ops.attention.cudnn import cudnn
from neo_jax.ops.attention.dense import dense
from neo_jax.ops.attention.mask import Mask
from neo_jax.ops.attention.single import LANES, single
from neo_jax.ops.attention.splash import splash
from neo_jax.ops.int8 import Int8
from neo_jax.sharding.rules import Sharding, device_of

KERNELS: dict[str, Callable[..., Array]] = {
    "dense": dense,
    "single": single,
    "blocked": blocked,
    "splash": splash,
    "cudnn": cudnn,
    "splash-256": functools.partial(splash, largest=256),
    "splash-1024": functools.partial(splash, largest=1024),
}
OF_DEVICE = {"tpu": "splash", "gpu": "cudnn"}
"""The kernels that are made for one kind of device, and which the compiler cannot split."""


def attend(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B N S H"] | Int8,
    v: Float[Array, "B N S H"] | Int8,
    mask: Mask,
    kernel: Kernel = "auto",
    sharding: Sharding | None = None,
) -> Float[Array, "B N T H"]:
    """Softmax attention without scaling, as GPT-Neo has it: softmax(q k^T + mask) v, in float32.

    Args:
      q: queries.
      k: keys; int8 where they are those of a cache, which dense serves.
      v: values, likewise.
      mask: which key each query sees.
      kernel: which implementation; "auto" takes dense unless the sequence attends to itself, then
        what is made for the device where that can do it, and else blocked.
      sharding: how rows and heads are laid out on a mesh.

    Raises:
      NeoError: see `choose`.
    """
    is_split = mask.aligned and bool(context_axes(sharding))
    name = choose(kernel, q, mask, device_of(sharding), is_split)
    if sharding and is_split:
        assert isinstance(k, Array)  # Int8 are those of caches
        assert isinstance(v, Array)
        return attend_split(KERNELS[name], name == "splash", q, k, v, mask, sharding)
    if sharding is None or name.partition("-")[0] not in OF_DEVICE.values():
        return KERNELS[name](q, k, v, mask)
    heads = sharding.spec((BATCH, HEADS, None, None), q.shape, "queries")
    rows = sharding.spec((BATCH, None), mask.q_positions.shape, "positions")
    on_each_device = jax.shard_map(
        KERNELS[name],
        mesh=sharding.mesh,
        in_specs=(heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,  # Pallas kernels do not declare along which axes they vary
    )
    return on_each_device(q, k, v, mask)


def choose(kernel: str, q: Array, mask: Mask, device: Any, is_split: bool = False) -> str:
    """Returns the name of the implementation that serves queries [B, N, T, H] on a device.

    `is_split` says whether devices share a sequence.

    Raises:
      NeoError: unknown kernel, or one that cannot serve these; the message names another.
    """
    usual = "blocked" if mask.aligned else "dense"
    if kernel == "auto":
        fast = OF_DEVICE.get(device.platform, usual if mask.aligned else "single")
        return usual if _obstacle(fast, q, mask, device, is_split) else fast
    if kernel not in KERNELS:
        raise NeoError(f"unknown attention kernel '{kernel}'.{suggest(kernel, KERNELS)}")
    obstacle = _obstacle(kernel, q, mask, device, is_split)
    if obstacle:
        raise NeoError(f"the '{kernel}' kernel {obstacle}; use '{usual}'.")
    return kernel


def _obstacle(kernel: str, q: Array, mask: Mask, device: Any, is_split: bool) -> str:
    """Returns why a kernel cannot serve these queries, "" where it can."""
    if kernel == "single":
        slots = mask.k_positions.shape[1]
        if q.shape[2] != 1:
            return f"serves one query a row, not {q.shape[2]}"
        if q.shape[-1] % LANES or slots % LANES:
            sizes = f"{slots} and {q.shape[-1]}"
            return f"takes slots and widths of heads in multiples of {LANES}, not {sizes}"
    elif kernel != "dense" and not mask.aligned:
        return "serves a sequence that attends to itself"
    if kernel.startswith("splash"):
        if is_split and kernel != "splash":
            return "serves no sequence that the rules split over devices"
        if device.platform != "tpu":
            return f"runs on TPUs, not on a {device.platform.upper()}"
        kind = getattr(device, "device_kind", "")
        if kind in OLD_TPUS:
            return f"runs on TPUs from v4 on, not on a {kind}"
        if q.dtype != jnp.bfloat16:
            return f"computes in bfloat16, not in {q.dtype}"
    if kernel == "cudnn":
        if not compute_capability(device) >= BFLOAT16_CAPABILITY:
            return "runs on NVIDIA GPUs of compute capability 8.0 or newer"
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16 or float16, not in {q.dtype}"
        if is_split:
            return "serves no sequence that the rules split over devices"
        if mask.segment_starts is not None:
            return "knows neither documents within a row nor padding"
        if q.shape[-1] > 128 or q.shape[-1] % 8:
            return f"takes heads of up to 128, a multiple of 8, not of {q.shape[-1]}"
    return ""


__all__ = [
    "KERNELS",
    "Kernel",
    "Mask",
    "attend",
    "blocked",
    "choose",
    "cudnn",
    "dense",
    "single",
    "splash",
]
