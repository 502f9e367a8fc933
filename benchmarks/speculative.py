"""Speculative decoding of a 1.3B-shaped model on a CPU, with and without a draft, taking turns.

  python benchmarks/speculative.py [--rounds 3] [--new 32] [--drafted 4] [--scale 0.2]

Random weights with Mesh-TensorFlow's initialisation (two layers, and copies of them), bfloat16
(quicker than float32 here), batch 1, temperature 1. How acceptance is made: the draft is the first
two of the target's 24 layers with the target's embeddings, and what the other 22 layers add to the
residual stream is scaled down by `--scale`, so that they contribute little. Speed does not depend
on the values: every weight is read. Such a draft has 0.2 billion parameters, more than GPT-Neo
125M. Prints the acceptance that came of it, tokens/s, the median ratio over rounds, and the most
memory that the process had.
"""

import argparse
import dataclasses
import resource
import statistics
import time

import jax
import jax.numpy as jnp

from neo_jax.config import preset
from neo_jax.decode import engine, speculative
from neo_jax.decode.options import SamplingOptions, make_settings
from neo_jax.decode.speculative import Draft
from neo_jax.model.transformer import Neo, init_params

PROMPT = list(range(100, 132))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt-neo-1.3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--drafted", type=int, default=4)
    parser.add_argument("--scale", type=float, default=0.2)
    args = parser.parse_args()
    config = dataclasses.replace(preset(args.model), eos_token_id=-1)
    model = Neo(config, jnp.bfloat16)
    params = make_params(model, args.scale)
    small = Neo(dataclasses.replace(config, num_layers=2), jnp.bfloat16)
    kept = {"h_0", "h_1", "wte", "wpe", "ln_f"}
    draft = Draft(small, {name: part for name, part in params.items() if name in kept})

    def plain(seed):
        settings = make_settings(SamplingOptions(temperature=1.0, top_p=1.0), [seed])
        return engine.generate(model, params, [PROMPT], args.new, settings)[0]

    def drafted(seed):
        settings = make_settings(SamplingOptions(temperature=1.0, top_p=1.0), [seed])
        _, fared = speculative.generate(
            model, params, draft, [PROMPT], args.new, settings, args.drafted
        )
        return fared[0]

    plain(0), drafted(0)  # compile
    times, fared = {plain: [], drafted: []}, []
    for round_ in range(args.rounds):
        for way in list(times)[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            result = way(round_ + 1)
            times[way].append(time.perf_counter() - start)
            if way is drafted:
                fared.append(result)
    accepted, judged = sum(f.accepted for f in fared), sum(f.judged for f in fared)
    passes = sum(f.passes for f in fared)
    ratio = statistics.median(p / d for p, d in zip(times[plain], times[drafted], strict=True))
    for name, way in (("without", plain), ("with", drafted)):
        print(f"{name:<8} {args.new / statistics.median(times[way]):.2f} tokens/s")
    print(f"ratio    {ratio:.2f}")
    print(f"accepted {accepted / judged:.2f} of {judged} drafted tokens that were judged")
    print(f"tokens a pass {args.rounds * args.new / passes:.2f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def make_params(model: Neo, scale: float) -> dict:
    """Draws two layers and copies them, what the layers after the second add scaled down."""
    small = Neo(dataclasses.replace(model.config, num_layers=2), model.dtype)
    drawn = jax.jit(lambda key: init_params(small, key))(jax.random.key(0))

    def copy(path, leaf, scale):
        adds = path[-1].key == "kernel" and path[-2].key in ("out_proj", "c_proj")
        return ((scale if adds else 1) * leaf).astype(jnp.bfloat16)

    def copied(part, scale=1.0):
        return jax.tree.map_with_path(lambda path, leaf: copy(path, leaf, scale), part)

    params = {name: copied(drawn[name]) for name in ("wte", "wpe", "ln_f")}
    for i in range(model.config.num_layers):
        params[f"h_{i}"] = copied(drawn[f"h_{i % 2}"], scale if i >= 2 else 1.0)
    return params


if __name__ == "__main__":
    main()
