"""The bundled model: a GPT-Neo of 6.5 million parameters, on public-domain English.

  neo-jax prepare tests/corpora/corpus.jsonl.xz --output runs/bundled/data \
      --train-tokenizer 4096 --held-out 0.03
  neo-jax train bundled

cost      18 million tokens, about an hour on two CPU cores that multiply bfloat16
expected  see its card, neo_jax/bundled/README.md
"""

from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="runs/bundled/data",
    output="runs/bundled",
    steps=4500,
    batch_size=4,
    model=ModelConfig(
        num_layers=4,
        embed_dim=320,
        num_heads=5,
        vocab_size=4096,
        max_length=1024,
        window_size=256,
        eos_token_id=1,
    ),
    optimizer=OptimizerConfig(
        learning_rate=8e-4,
        warmup_steps=300,
        final_fraction=0.05,
        beta2=0.95,
        weight_decay=0.1,
    ),
    z_loss=0.0,
    eval_every=500,
    save_every=250,
)
