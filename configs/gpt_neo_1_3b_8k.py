"""GPT-Neo 1.3B with a context of 8,192 tokens, on long texts of your own. For a v5litepod-8.

  neo-jax prepare my_books/ --output data/books --tokenizer gpt-neo-1.3b --held-out 0.01
  neo-jax train gpt-neo-1.3b-8k
  neo-jax eval --text my_books/held_out.txt --by-position --model runs/gpt-neo-1.3b-8k

cost      65 million tokens. Each sequence is split over two chips, weights, gradients and moments
          over all eight
expected  at the first step a loss as of the model as it came up to 2,048 tokens, and a higher one
          beyond; after the run it falls with the tokens before, up to 8,192; not run by us
"""

from neo_jax.config import ModelConfig
from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/books",
    output="runs/gpt-neo-1.3b-8k",
    steps=500,
    batch_size=16,
    pretrained="EleutherAI/gpt-neo-1.3B",
    model=ModelConfig(max_length=8192),  # all else is the checkpoint's
    new_positions="repeated",
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup_steps=50),
    remat="full",
    accumulation=4,
    mesh="fsdp=4,context=2",
    rules="context",
    eval_every=100,
    save_every=250,
)
