"""Every kernel of attention on the device against `dense` in float32 on the CPU, with gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accelerator.programs import prepare
from accelerator.rows import Row
from accelerator.sizes import Heads, Sizes
from neo_jax.errors import NeoError
from neo_jax.ops.attention import KERNELS, OF_DEVICE, Mask, attend, dense

TOLERANCES = {"float32": 2e-5, "bfloat16": 2**-7, "float16": 2**-10}
"""Of the norm of the difference over that of the result: in 16 bits a step of the type, in float32
what products of operands rounded to 10 bits (TF32) exceed twentyfold."""


class Case(NamedTuple):
    """A kernel and what it is tried on."""

    kernel: str
    dtype: str
    heads: Heads


def cases(sizes: Sizes) -> dict[str, Case]:
    """Returns all kernels in all dtypes on all shapes, by name."""
    return {
        f"{kernel} {dtype} {'x'.join(map(str, heads[:4]))} window {heads.window}": Case(
            kernel, dtype, heads
        )
        for heads in sizes.attention
        for kernel in KERNELS
        for dtype in TOLERANCES
    }


def start(sizes: Sizes, wanted: Sequence[Case], at_once: int) -> Callable[[Case], Row]:
    """Returns what gives the row of a case."""
    results = prepare(_on_device, wanted, at_once)
    return lambda case: _compare(case, results)


def _compare(case: Case, results: Callable[[Case], Any]) -> Row:
    platform = jax.local_devices()[0].platform
    row: Row = {"kernel": case.kernel, "dtype": case.dtype, **case.heads._asdict()}
    if case.kernel in OF_DEVICE.values() and OF_DEVICE.get(platform) != case.kernel:
        return row | {"note": "not on this device"}
    try:
        ours = results(case)
    except NeoError as error:
        return row | {"note": str(error)}
    arguments = [x.astype(np.float32) for x in _arguments(case)]
    cpu = jax.local_devices(backend="cpu")[0]
    oracle = jax.jit(_with_gradients(dense, case.heads))(*jax.device_put(arguments, cpu))
    errors = [_relative(mine, theirs) for mine, theirs in zip(ours, oracle, strict=True)]
    row |= {"values": errors[0], "gradients": max(errors[1:]), "tolerance": TOLERANCES[case.dtype]}
    if not max(errors) <= row["tolerance"]:  # NaN is wrong too
        row["failed"] = f"off by {max(errors):.2g}, {row['tolerance']:.2g} is allowed"
    return row


def _on_device(case: Case) -> list[np.ndarray]:
    def kernel(q: Any, k: Any, v: Any, mask: Mask) -> Any:
        return attend(q, k, v, mask, case.kernel)  # type: ignore[arg-type]  # one of KERNELS

    return jax.device_get(jax.jit(_with_gradients(kernel, case.heads))(*_arguments(case)))


def _with_gradients(kernel: Callable[..., Any], heads: Heads) -> Callable[..., Any]:
    """Returns a function of q, k, v and the output's gradient: the output and three gradients."""

    def both(*qkv_and_gradient: Any) -> Any:
        positions = jnp.broadcast_to(jnp.arange(heads.length), (heads.batch, heads.length))
        mask = Mask(positions, positions, heads.window, aligned=True)
        *qkv, gradient = qkv_and_gradient
        y, pull = jax.vjp(lambda *qkv: kernel(*qkv, mask), *qkv)
        return y, *pull(gradient.astype(y.dtype))

    return both


def _arguments(case: Case) -> list[np.ndarray]:
    """Draws q, such that logits have standard deviation 2, k, v and the output's gradient."""
    rng = np.random.default_rng(0)
    drawn = [rng.normal(size=case.heads[:4]) for _ in range(4)]
    drawn[0] *= 2 / case.heads.head_dim**0.5
    return [np.asarray(x, jnp.dtype(case.dtype)) for x in drawn]


def _relative(mine: Any, theirs: Any) -> float:
    mine, theirs = np.asarray(mine, np.float64), np.asarray(theirs, np.float64)
    return float(np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-30))
