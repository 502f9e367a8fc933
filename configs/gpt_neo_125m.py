"""GPT-Neo 125M as published: 300 billion tokens of The Pile.

  neo-jax prepare "pile/*.jsonl.zst" --output data/pile --tokenizer gpt2 --held-out 0.001
  neo-jax train gpt-neo-125m

The tokenizer is GPT-2's, which is GPT-Neo's. It runs on any
number of chips that divides 64, such as the 16 of a v5e-16; where they have several hosts, which
must all see the two folders, --data gs://bucket/pile --output gs://bucket/run.

cost      2.3e20 floating-point operations (6 a parameter and token), attention apart
expected  as published: WikiText perplexity 32.285, LAMBADA perplexity 30.266, accuracy 37.36 %
          (README of EleutherAI/gpt-neo); not run by us
"""

from neo_jax.config import preset
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/pile",
    output="runs/gpt-neo-125m",
    steps=572_300,
    batch_size=256,
    model=preset("gpt-neo-125m"),
    optimizer=OptimizerConfig(learning_rate=6e-4),  # the rest as published by default
    accumulation=4,
    mesh="fsdp=-1",
    log_every=100,
    eval_every=5000,
    save_every=1000,
    keep_every=50_000,
)
