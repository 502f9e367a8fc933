"""A first model in minutes on two CPU cores: 1.6 million parameters, on public-domain English.

  neo-jax prepare tests/corpora/corpus.jsonl.xz --output runs/cpu/data \
      --train-tokenizer 2048 --held-out 0.03
  neo-jax train cpu
  neo-jax generate "My dear Emma," --model runs/cpu/model

cost      614,400 tokens; measured on two CPU cores next to other work: six minutes
expected  held-out loss 5.11 nats a token, 2.17 bits a byte: words, no sentences yet
"""

from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="runs/cpu/data",
    output="runs/cpu",
    steps=300,
    batch_size=8,
    model=ModelConfig(
        num_layers=4,
        embed_dim=160,
        num_heads=5,
        vocab_size=2048,
        max_length=256,
        window_size=64,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
    dtype="float32",
    eval_every=100,
    save_every=100,
)
