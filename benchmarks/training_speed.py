"""Training on a CPU against PyTorch, in one process, taking turns; prints ratios.

  python benchmarks/training_speed.py [--rounds 5] [--dtypes bfloat16 float32] [--json]
  python benchmarks/training_speed.py --memory [--dtypes bfloat16 float32]

GPT-Neo 125M in shape, random tokens; the peer is transformers (eager) with clipping and
`torch.optim.AdamW(fused=True)`, under bfloat16 autocast or in float32. Each figure is the median
over rounds of their time of a step over ours: above 1 we are faster. Wants a quiet machine.

With --memory each side runs alone in a process of its own; the figure is the most memory that the
process ever held, beyond what its imports take.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

SHAPES = [(1, 2048), (1, 1024), (4, 256)]  # sequences, tokens of each
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--remat", default="none")
    parser.add_argument("--shapes", nargs="+", type=int, default=range(len(SHAPES)))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)  # a side and the batch
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.alone:
        print(memory_of(args.alone[0], int(args.alone[1]), args.dtypes[0], args.remat))
        return
    results = {}
    for dtype in args.dtypes:
        for batch, length in [SHAPES[i] for i in args.shapes]:
            measure = memory if args.memory else speed
            result = results[f"{dtype}, {batch} x {length}"] = measure(batch, length, dtype, args)
            if not args.json:
                print(f"{dtype:<9} {batch} x {length:<5}", end="", flush=True)
                print("  ".join(f"{name} {value:.3g}" for name, value in result.items()))
    if args.json:
        print(json.dumps(results, indent=2))


def speed(batch, length, dtype, args):
    """Returns the ratio of the two sides' times, and both."""
    sides = {"ours": ours(batch, length, dtype, args.remat), "theirs": theirs(batch, length, dtype)}
    times = {name: [] for name in sides}
    for round_ in range(args.rounds + 1):
        for name in list(sides)[:: 1 if round_ % 2 else -1]:
            start = time.perf_counter()
            sides[name]()
            if round_:  # the first is for compiling and warming up
                times[name].append(time.perf_counter() - start)
    pairs = zip(times["theirs"], times["ours"], strict=True)
    return {
        "ratio": statistics.median(t / m for t, m in pairs),
        "our seconds": statistics.median(times["ours"]),
        "their seconds": statistics.median(times["theirs"]),
    }


def memory(batch, length, dtype, args):
    """Returns the peak memory of each side, in GB, and ours over theirs."""
    peaks = {}
    for side in ("ours", "theirs"):
        index = str(SHAPES.index((batch, length)))
        command = [sys.executable, __file__, "--alone", side, index, "--dtypes", dtype]
        done = subprocess.run(
            [*command, "--remat", args.remat], capture_output=True, text=True, check=True
        )
        peaks[side] = float(done.stdout.split()[-1])
    return {"ours over theirs": peaks["ours"] / peaks["theirs"], **peaks}


def memory_of(side, shape, dtype, remat):
    """Returns the most that this process holds in three steps, in GB."""
    batch, length = SHAPES[shape]
    import jax  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    def held():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    before = held()
    step = ours(batch, length, dtype, remat) if side == "ours" else theirs(batch, length, dtype)
    for _ in range(3):
        step()
    return held() - before


def draw(batch, length):
    return np.random.default_rng(0).integers(0, 50257, (batch, length + 1))


def ours(batch, length, dtype, remat):
    """Returns a function that does a step of neo_jax and waits for it."""
    import jax.numpy as jnp

    from neo_jax.config import preset
    from neo_jax.model.transformer import Neo
    from neo_jax.training.config import OptimizerConfig, TrainConfig
    from neo_jax.training.objectives.next_token import Batch
    from neo_jax.training.optimizer import make_optimizer
    from neo_jax.training.step import init_state, make_step

    config = TrainConfig(
        data="",
        output="",
        steps=1000,
        batch_size=batch,
        length=length,
        model=preset("gpt-neo-125m"),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0, weight_decay=0.1),
        dtype=dtype,
        remat=remat,
    )
    optimizer = make_optimizer(config.optimizer, config.steps)
    model = Neo(config.model, jnp.dtype(dtype))
    state = init_state(model, optimizer, 0)
    train_step = make_step(model, optimizer, config)
    tokens = draw(batch, length).astype(np.int32)
    on_device = Batch(jnp.asarray(tokens), jnp.ones((batch, length)))

    def step():
        nonlocal state
        state, metrics = train_step(state, on_device)
        return float(metrics["loss"])

    return step


def theirs(batch, length, dtype):
    """Returns a function that does a step of PyTorch."""
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    from neo_jax.config import preset

    fields = preset("gpt-neo-125m").to_hf()
    del fields["attention_layers"]
    model = GPTNeoForCausalLM(GPTNeoConfig(**fields, attn_implementation="eager")).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(draw(batch, length))
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = model(inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
