"""Many prompts of mixed lengths: `neo-jax generate --prompts-file` against a transformers loop.

  python benchmarks/prompts_file.py [--rounds 3] [--full] [--prompts 200] [--json]

GPT-Neo 125M in shape, random weights, the same in both; float32; greedy; in one process, taking
turns. transformers reads the prompts in their order, 8 at a time, padded on the left; we refill a
batch (`neo_jax/decode/scheduler.py`). The lengths of prompts are spread evenly in their logarithm
from 8 to 512 tokens. Each text ends after 8 to 64 new tokens, drawn evenly, as an end of text would
have it; with --full each has 64. Printed is the median over rounds of their time over ours: above 1
we are faster. Wants a quiet machine.
"""

import argparse
import dataclasses
import json
import statistics
import time

import jax
import numpy as np
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM, StoppingCriteria, StoppingCriteriaList

from neo_jax.config import preset
from neo_jax.decode.options import SamplingOptions
from neo_jax.decode.scheduler import Request, complete, in_order
from neo_jax.model import tensor_table
from neo_jax.model.transformer import Neo, init_params

NEW, LONGEST, THEIR_BATCH = 64, 512, 8
GREEDY = SamplingOptions(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16, help="ours")
    parser.add_argument("--full", action="store_true", help="every text has 64 new tokens")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(8), np.log(LONGEST), args.prompts)).astype(int)
    prompts = [rng.integers(0, 50257, length).tolist() for length in lengths]
    new = np.full(args.prompts, NEW) if args.full else rng.integers(8, NEW + 1, args.prompts)
    ours, theirs = make_models(args.layers, args.batch_size)
    sides = [(ours, []), (theirs, [])]
    texts = {}
    for round_ in range(args.rounds + 1):
        for generate, times in sides[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            texts[generate] = generate(prompts, new.tolist())
            if round_:  # the first is for compiling and warming up
                times.append(time.perf_counter() - start)
    (_, mine), (_, other) = sides
    same = sum(a == b for a, b in zip(texts[ours], texts[theirs], strict=True))
    results = {
        "ratio": statistics.median(t / m for m, t in zip(mine, other, strict=True)),
        "ours_seconds": statistics.median(mine),
        "theirs_seconds": statistics.median(other),
        "new_tokens": int(new.sum()),
        "prompt_tokens": int(lengths.sum()),
        "same_texts": f"{same}/{args.prompts}",
    }
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        print(
            f"{results['ratio']:.2f} times: {results['ours_seconds']:.1f} s against "
            f"{results['theirs_seconds']:.1f} s; {same} of {args.prompts} texts are the same"
        )


class _Ends(StoppingCriteria):
    """Ends each row of a batch after its own number of new tokens."""

    def __init__(self, start: int, new: list[int]):
        self._stops = start + torch.tensor(new)

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self._stops


def make_models(layers: int, batch_size: int):
    """Returns two functions (prompts, new tokens of each) -> new ids of each, of one model."""
    config = dataclasses.replace(preset("gpt-neo-125m"), num_layers=layers, eos_token_id=-1)
    model = Neo(config)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    fields = {k: v for k, v in config.to_hf().items() if k != "attention_layers"}
    reference = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager")).eval()
    weights = {}
    for tensor in tensor_table.tensors(config):
        leaf = params
        for key in tensor.path:
            leaf = leaf[key]
        weights[tensor.hf_name] = torch.from_numpy(np.array(tensor.to("hf", np.asarray(leaf))))
    reference.load_state_dict(weights, strict=False)
    reference.tie_weights()
    reference.generation_config.eos_token_id = None

    def ours(prompts, new):
        requests = [
            Request(prompt, count, [GREEDY]) for prompt, count in zip(prompts, new, strict=True)
        ]
        done = in_order(complete(model, params, requests, batch_size))
        return [text.ids for (text,) in done]

    def theirs(prompts, new):
        texts = []
        for first in range(0, len(prompts), THEIR_BATCH):
            some, counts = (x[first : first + THEIR_BATCH] for x in (prompts, new))
            width = max(map(len, some))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in some])
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in some])
            with torch.inference_mode():
                out = reference.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max(counts),
                    stopping_criteria=StoppingCriteriaList([_Ends(width, counts)]),
                    do_sample=False,
                    pad_token_id=0,
                )
            rows = zip(out.tolist(), counts, strict=True)
            texts += [row[width : width + count] for row, count in rows]
        return texts

    return ours, theirs


if __name__ == "__main__":
    main()
