"""Generation on a CPU against transformers, in one process, taking turns; prints ratios.

  python tests/benchmarks/against_transformers.py [--rounds 5] [--json]

GPT-Neo 125M in shape, random weights, the same in both; float32; greedy. Each figure is the median
over rounds of their time over ours: above 1 we are faster. Wants a quiet machine.

  decode    64 new tokens after a prompt of 32, less the time of 1 new token after the same prompt
  prefill   the first new token after a long prompt
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from neo_jax import names
from neo_jax.config import preset
from neo_jax.decode import engine
from neo_jax.decode.sampling import SamplingOptions, make_settings
from neo_jax.model import Neo, init_params

NEW, PROMPT = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    ours, theirs = make_models()
    results = {}
    for name, batch, length, new in [
        ("decode, batch 1", 1, PROMPT, NEW),
        ("decode, batch 8", 8, PROMPT, NEW),
        ("prefill 1024", 1, 1024, 1),
        ("prefill 2047", 1, 2047, 1),
    ]:
        prompts = np.random.default_rng(0).integers(0, 50257, (batch, length))
        sides = [(ours, []), (theirs, [])]
        for round_ in range(args.rounds + 1):
            for generate, times in sides[:: 1 if round_ % 2 else -1]:
                seconds = timed(generate, prompts, new)
                if new > 1:
                    seconds -= timed(generate, prompts, 1)
                if round_:  # the first is for compiling and warming up
                    times.append(seconds)
        (_, mine), (_, other) = sides
        tokens = batch * (new - 1 if new > 1 else length)
        results[name] = {
            "ratio": statistics.median(t / m for m, t in zip(mine, other, strict=True)),
            "ours_tokens_per_second": tokens / statistics.median(mine),
            "theirs_tokens_per_second": tokens / statistics.median(other),
        }
        if not args.json:
            print(
                f"{name:<16} {results[name]['ratio']:.2f} times  "
                f"{results[name]['ours_tokens_per_second']:.1f} against "
                f"{results[name]['theirs_tokens_per_second']:.1f} tokens/s",
                flush=True,
            )
    if args.json:
        print(json.dumps(results, indent=2))


def make_models():
    """Returns two functions (prompts [B, T], new tokens) -> ids [B, new], of the same weights."""
    config = preset("gpt-neo-125m")
    model = Neo(config)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    fields = {k: v for k, v in config.to_hf().items() if k != "attention_layers"}
    reference = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager")).eval()
    weights = {}
    for tensor in names.tensors(config):
        leaf = params
        for key in tensor.path:
            leaf = leaf[key]
        weights[tensor.hf_name] = torch.from_numpy(np.array(tensor.to("hf", np.asarray(leaf))))
    reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    reference.generation_config.eos_token_id = None

    def ours(prompts, new):
        settings = make_settings(SamplingOptions(temperature=0.0), [0] * len(prompts))
        done = engine.generate(model, params, prompts.tolist(), new, settings)
        return [completion.ids for completion in done]

    def theirs(prompts, new):
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

    prompts = np.random.default_rng(1).integers(0, 50257, (2, PROMPT))
    same = np.mean(np.array(ours(prompts, 16)) == np.array(theirs(prompts, 16)))
    print(f"the two agree on {same:.0%} of 32 greedy tokens", flush=True)
    return ours, theirs


def timed(generate, prompts, new) -> float:
    start = time.perf_counter()
    generate(prompts, new)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
