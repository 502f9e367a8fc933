"""GPT-Neo 2.7B as published: 420 billion tokens of The Pile. For a v5e-256.

  neo-jax prepare "pile/*.jsonl.zst" --output data/pile --tokenizer gpt2 --held-out 0.001
  neo-jax train gpt-neo-2.7b

The tokenizer is GPT-2's, which is GPT-Neo's. All hosts must see
the two folders: --data gs://bucket/pile --output gs://bucket/run. On another number of chips give
another --mesh, and --accumulation k where 512 / k is a multiple of it.

cost      6.7e21 floating-point operations (6 a parameter and token), attention and what remat
          computes again apart
expected  as published: 0.7165 bits a byte of The Pile, WikiText perplexity 11.39, LAMBADA
          perplexity 5.626, accuracy 62.22 % (README of EleutherAI/gpt-neo); not run by us
"""

from neo_jax.config import preset
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/pile",
    output="runs/gpt-neo-2.7b",
    steps=400_000,
    batch_size=512,
    model=preset("gpt-neo-2.7b"),
    optimizer=OptimizerConfig(learning_rate=1.6e-4),  # the rest as published by default
    remat="full",
    mesh="data=16,fsdp=16",  # the torus of a v5e-256
    log_every=100,
    eval_every=5000,
    save_every=1000,
    keep_every=20_000,
)
