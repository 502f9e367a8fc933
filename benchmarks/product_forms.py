"""The forms in which a CPU multiplies few rows by weights; prints milliseconds.

  python benchmarks/product_forms.py [--rows 1 8] [--dtypes float32 bfloat16] [--rounds 5]

The weights are those of GPT-Neo 125M, the output head among them, each read once a pass. All forms
take turns, and the time is that of the fastest pass. `Einsum` chooses among them by dtype and
number of rows; a single row of bfloat16 is doubled first. Wants a quiet machine.
"""

import argparse
import math
import time

import jax
import jax.numpy as jnp

from neo_jax.ops.matmul import halved, product, turned

WIDTH, LAYERS, ROWS_OF_TABLE = 768, 12, 50304


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 6, 8, 16, 32, 40, 48, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for dtype in args.dtypes:
        weights = draw(jnp.dtype(dtype))
        for rows in args.rows:
            times = measure(jnp.dtype(dtype), weights, rows, args.rounds)
            best = min(times, key=times.get)
            told = "  ".join(f"{form} {ms:6.1f}" for form, ms in times.items())
            print(f"{dtype:<8} {rows:3} rows  {told}  ms: {best}", flush=True)


def draw(dtype):
    """Returns the matrices [outputs, inputs] of every layer, and the head."""
    square, up, down = (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)
    shapes = [[square] * 4 + [up, down]] * LAYERS + [[(ROWS_OF_TABLE, WIDTH)]]
    key = jax.random.key(0)
    return [
        [(jax.random.normal(key, shape) / math.sqrt(shape[1])).astype(dtype) for shape in layer]
        for layer in shapes
    ]


def measure(dtype, weights, rows, rounds) -> dict[str, float]:
    """Returns the milliseconds of a pass by every form."""
    forms = {
        "plain": lambda x, w: product("bi,oi->bo", x, w, dtype),
        "turned": lambda x, w: turned(x, w, dtype),
    }
    if rows == 1 and dtype == jnp.float32:
        forms["halved"] = lambda x, w: halved(x, w, dtype, is_single=True)

    def passed(multiply, x, weights):
        *layers, (head,) = weights
        for q, k, v, out, up, down in layers:
            x = x + multiply(multiply(x, q) * multiply(x, k) + multiply(x, v), out)
            x = x + multiply(multiply(x, up), down)
            x = x / jnp.abs(x).max()
        return x + multiply(x, head).max()

    programs = {
        form: jax.jit(
            lambda x, weights, passes, multiply=multiply: jax.lax.fori_loop(
                0, passes, lambda _, x: passed(multiply, x, weights), x
            )
        )
        for form, multiply in forms.items()
    }
    x = jnp.ones((max(rows, 2 if dtype == jnp.bfloat16 else 1), WIDTH))
    times = dict.fromkeys(forms, math.inf)
    for round_ in range(rounds + 1):
        for form, program in programs.items():
            start = time.perf_counter()
            program(x, weights, 3).block_until_ready()
            if round_:  # the first compiles
                times[form] = min(times[form], (time.perf_counter() - start) / 3 * 1e3)
    return times


if __name__ == "__main__":
    main()
