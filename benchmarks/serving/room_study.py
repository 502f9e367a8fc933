"""How many texts fit on a chip, by how their caches are laid out: arithmetic; prints a table.

  python benchmarks/serving/room_study.py [--texts 20000] [--json FILE]

Prompts and answers as long as ShareGPT's conversations: on average 161.31 and 337.99 tokens, as
Kwon et al. publish ("Efficient memory management for large language model serving with
PagedAttention", 2023, figure 11). The shape of the distribution is not published; here the
logarithms of both are normal with a standard deviation of 1, and what exceeds the context is cut.
A tenth of a chip's memory is left for activations and programs. What is compared:

  full      every text has the slots of the whole context
  batch     all texts have the slots of the longest, as a batch of `neo-jax serve` has
  slots     each text has slots for its own length, rounded up as `capacity` does
  pages     pages of 32 tokens are taken as a text grows; a local layer gives back those that are
            behind its window
  padded    the same for a kernel that wants a power of two or a multiple of 8 of heads, and heads
            of 128, as `jax.experimental.pallas.ops.tpu.ragged_paged_attention` does
"""

import argparse
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from neo_jax.config import ModelConfig, preset
from neo_jax.decode.capacity import capacity, coarse_capacity
from neo_jax.devices.chips import CHIPS
from neo_jax.model.cache import num_bytes, num_slots, sequence_bytes

PROMPT, ANSWER, SPREAD = 161.31, 337.99, 1.0
PAGE, LEFT = 32, 0.9
MODELS, TOPOLOGIES = ("gpt-neo-1.3b", "gpt-neo-2.7b"), ("v5e", "v6e")
KINDS = ("full", "batch", "slots", "pages", "padded")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=20000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print("| model | chip | weights and cache | " + " | ".join(KINDS) + " |")
    print("|---|---|---|" + "---|" * len(KINDS))
    for name in MODELS:
        for chip in TOPOLOGIES:
            for dtype in ("bfloat16", "int8"):
                fit = texts_that_fit(preset(name), chip, jnp.dtype(dtype), *draw(args.texts))
                rows.append({"model": name, "chip": chip, "dtype": dtype, **fit})
                cells = " | ".join(str(fit[kind]) for kind in KINDS)
                print(f"| {name} | {chip} | {dtype} | {cells} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of prompts, and of prompts with their answers."""
    rng = np.random.default_rng(0)
    means = np.log([PROMPT, ANSWER]) - SPREAD**2 / 2
    prompts, answers = np.exp(rng.normal(means, SPREAD, (count, 2))).astype(int).T + 1
    prompts = np.minimum(prompts, 2047)
    return prompts, np.minimum(prompts + answers, 2048)


def texts_that_fit(
    config: ModelConfig, chip: str, dtype: np.dtype, prompts: np.ndarray, ends: np.ndarray
) -> dict[str, int]:
    """Returns how many texts have room at a time, by kind."""
    weights = config.num_params * dtype.itemsize
    free = LEFT * CHIPS[f"TPU {chip}"].memory - weights

    def of_slots(slots: int) -> int:
        return sequence_bytes(config, slots, dtype).per_sequence

    # A text is there in proportion to its answer: a step writes one token of it.
    steps = (ends - prompts).clip(1)
    by_slots = {slots: of_slots(slots) for slots in {capacity(int(end), 2048) for end in ends}}
    own = np.average([by_slots[capacity(int(end), 2048)] for end in ends], weights=steps)
    return {
        "full": int(free / of_slots(2048)),
        "batch": in_one_batch(free, ends, of_slots),
        "slots": int(free / own),
        "pages": int(free / paged(config, dtype, prompts, ends, config.num_heads, config.head_dim)),
        "padded": int(free / paged(config, dtype, prompts, ends, *padded(config))),
    }


def in_one_batch(free: float, ends: np.ndarray, of_slots) -> int:
    """Returns how many rows there are if each has the slots of the longest of them, on average."""
    found = []
    for batch in np.random.default_rng(1).permuted(ends)[:4096].reshape(-1, 64):
        longest = np.maximum.accumulate(batch)
        slots = [coarse_capacity(int(length), 2048) for length in longest]
        fits = [rows for rows, size in enumerate(slots, 1) if rows * of_slots(size) <= free]
        # Beyond 64 rows the longest is the whole context, or nearly.
        found.append(max(fits[-1], int(free / of_slots(2048))))
    return int(np.mean(found))


def paged(config, dtype, prompts, ends, heads: int, head_dim: int) -> float:
    """Returns the bytes of a text's pages, on average over the steps that write it."""
    page = PAGE * num_bytes(config, 1, dtype) * heads * head_dim
    page /= config.num_heads * config.head_dim
    window = -(-num_slots(config, config.attention_types.index("local"), 2048, 0) // PAGE) + 1
    num_local = sum(config.window(i) is not None for i in range(config.num_layers))
    num_global = config.num_layers - num_local
    total = count = 0
    for prompt, end in zip(prompts, ends, strict=True):
        pages = -(-np.arange(prompt + 1, end + 1) // PAGE)
        total += float(page * (num_global * pages + num_local * np.minimum(pages, window)).sum())
        count += len(pages)
    return total / count


def padded(config: ModelConfig) -> tuple[int, int]:
    """Returns the heads and their width that the kernel takes."""
    heads = next(n for n in range(config.num_heads, 999) if n in (1, 2, 4, 8) or n % 8 == 0)
    return heads, max(config.head_dim, 128)


if __name__ == "__main__":
    main()
