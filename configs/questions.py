"""Answers to questions about a life that is told: a recipe, for the bundled model on a CPU.

  neo-jax recipe questions

Lines of --examples and --test-examples, in the place of those that are made:

  {"prompt": "...\nQuestion: Where was Mary Price born?\nAnswer:", "completion": " Boston"}

cost      768,000 tokens; two CPU cores alone nine minutes (1,500 tokens/s)
expected  F1 38.0 % of 200: trades 98 %, places 22 to 31 %, years none; the answer to the likest
          prompt has 33.5 %. A model so small does not copy from its prompt after so few steps

A published model, on examples of yours and one v5e chip:

  neo-jax recipe questions --examples train.jsonl --test-examples test.jsonl --output runs/mine \
      --pretrained EleutherAI/gpt-neo-1.3B --lora.rank 16 --optimizer.learning-rate 2e-4 \
      --length 256 --batch-size 32 --accumulation 4 --remat full --dtype bfloat16 \
      --steps 2000 --max-new-tokens 32

cost      16 million tokens, 2000 steps of at least 0.29 s and 3.6 GB of the chip (neo-jax plan): at
          least 10 minutes, compiling and answers apart
expected  not run by us
"""

from neo_jax.evaluation.recipes import Recipe
from neo_jax.training.config import OptimizerConfig, TrainConfig

recipe = Recipe(task="questions", metrics=("squad_f1", "squad_em"), max_new_tokens=12)
config = TrainConfig(
    data="runs/questions/data",
    output="runs/questions",
    steps=1500,
    batch_size=2,
    pretrained="bundled",
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    length=256,
    dtype="float32",
    eval_every=100,
    save_every=100,
    keep=1,
)
