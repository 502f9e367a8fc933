"""Generation on a CPU against transformers, in one process, taking turns; prints ratios.

  python benchmarks/against_transformers.py [--rounds 5] [--dtypes float32 bfloat16] [--json]

GPT-Neo 125M in shape, random weights, the same on all sides; greedy. Ratios are medians over rounds
of their time over ours: above 1 we are faster. "fastest" compares each side in its fastest dtype.
Wants a quiet machine.

  decode    64 new tokens after a prompt, less the time of 1 new token after the same prompt
  prefill   the first new token after a long prompt
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neo_jax.checkpoints.load import cached_dtype
from neo_jax.config import preset
from neo_jax.decode import engine
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.model import tensor_table
from neo_jax.model.transformer import Neo, init_params

CASES = {  # batch, tokens of the prompt, new tokens
    "decode, batch 1": (1, 32, 64),
    "decode, batch 8": (8, 32, 64),
    "prefill 1024": (1, 1024, 1),
    "prefill 2047": (1, 2047, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    sides = make_sides(args.dtypes)
    results = {}
    for name in args.cases:
        seconds = measure(sides, *CASES[name], args.rounds)
        results[name] = figures = summarize(name, seconds, args.dtypes)
        if not args.json:
            for dtype, (ratio, mine, others) in figures.items():
                print(
                    f"{name:<16} {dtype:<9} {ratio:.2f} times  "
                    f"{mine:.1f} against {others:.1f} tokens/s",
                    flush=True,
                )
    if args.json:
        print(json.dumps(results, indent=2))


def measure(sides, batch, length, new, rounds) -> dict[tuple[str, str], list[float]]:
    """Returns the seconds of every round, of every side."""
    prompts = np.random.default_rng(0).integers(0, 50257, (batch, length))
    times = {key: [] for key in sides}
    for round_ in range(rounds + 1):
        for key in list(sides)[:: 1 if round_ % 2 else -1]:
            seconds = timed(sides[key], prompts, new)
            if new > 1:
                seconds -= timed(sides[key], prompts, 1)
            if round_:  # the first is for compiling and warming up
                times[key].append(seconds)
    return times


def summarize(name, seconds, dtypes) -> dict[str, tuple[float, float, float]]:
    """Returns by dtype the ratio, and tokens a second of ours and theirs."""
    batch, length, new = CASES[name]
    tokens = batch * (new - 1 if new > 1 else length)
    median = {key: statistics.median(times) for key, times in seconds.items()}
    pairs = {dtype: (dtype, dtype) for dtype in dtypes}
    if len(dtypes) > 1:
        fastest = [min(dtypes, key=lambda d, who=who: median[who, d]) for who in ("ours", "theirs")]
        pairs["fastest"] = tuple(fastest)
    figures = {}
    for label, (mine, others) in pairs.items():
        rounds = zip(seconds["ours", mine], seconds["theirs", others], strict=True)
        figures[label] = (
            statistics.median(theirs / ours for ours, theirs in rounds),
            tokens / median["ours", mine],
            tokens / median["theirs", others],
        )
    return figures


def make_sides(dtypes):
    """Returns functions (prompts [B, T], new tokens) -> ids [B, new], of the same weights."""
    config = preset("gpt-neo-125m")
    params = jax.jit(lambda key: init_params(Neo(config), key))(jax.random.key(0))
    fields = {k: v for k, v in config.to_hf().items() if k != "attention_layers"}
    weights = {}
    for tensor in tensor_table.tensors(config):
        leaf = params
        for key in tensor.path:
            leaf = leaf[key]
        weights[tensor.hf_name] = torch.from_numpy(np.array(tensor.to("hf", np.asarray(leaf))))
    sides = {}
    for dtype in dtypes:
        reference = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager"))
        reference.load_state_dict(weights, strict=False)
        reference.tie_weights()
        reference.generation_config.eos_token_id = None
        cast = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)
        sides["ours", dtype] = make_ours(
            Neo(config, jnp.dtype(dtype), cache_dtype=cached_dtype("auto")),
            cast,
        )
        sides["theirs", dtype] = make_theirs(reference.eval().to(getattr(torch, dtype)))
    prompts = np.random.default_rng(1).integers(0, 50257, (2, 32))
    same = np.mean(
        np.array(sides["ours", dtypes[0]](prompts, 16))
        == np.array(sides["theirs", dtypes[0]](prompts, 16))
    )
    print(f"the two agree on {same:.0%} of 32 greedy tokens in {dtypes[0]}", flush=True)
    return sides


def make_ours(model, params):
    def generate(prompts, new):
        settings = make_settings(SamplingOptions(temperature=0.0), [0] * len(prompts))
        done = engine.generate(model, params, prompts.tolist(), new, settings)
        return [completion.ids for completion in done]

    return generate


def make_theirs(reference):
    def generate(prompts, new):
        ids = torch.from_numpy(prompts)
        with torch.inference_mode():
            out = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return out[:, prompts.shape[1] :].tolist()

    return generate


def timed(generate, prompts, new) -> float:
    start = time.perf_counter()
    generate(prompts, new)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
