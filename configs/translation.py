"""Sentences into French: a recipe, for the bundled model on a CPU.

  neo-jax recipe translation

Lines of --examples and --test-examples, in the place of those that are made:

  {"prompt": "English: The sea was calm.\nFrench:", "completion": " La mer était calme."}

cost      256,000 tokens; two CPU cores alone three minutes (1,500 tokens/s)
expected  chrF 94.9, 74 % word for word, of 200; the answer to the likest prompt has 75.4 and 0 %

A published model, on examples of yours and one v5e chip:

  neo-jax recipe translation --examples train.jsonl --test-examples test.jsonl --output runs/mine \
      --pretrained EleutherAI/gpt-neo-1.3B --lora.rank 16 --optimizer.learning-rate 2e-4 \
      --length 256 --batch-size 32 --accumulation 4 --remat full --dtype bfloat16 \
      --steps 2000 --max-new-tokens 128

cost      16 million tokens, 2000 steps of at least 0.29 s and 3.6 GB of the chip (neo-jax plan): at
          least 10 minutes, compiling and answers apart
expected  not run by us
"""

from neo_jax.evaluation.recipes import Recipe
from neo_jax.training.config import OptimizerConfig, TrainConfig

recipe = Recipe(task="translation", metrics=("chrf", "exact_match"), max_new_tokens=40)
config = TrainConfig(
    data="runs/translation/data",
    output="runs/translation",
    steps=500,
    batch_size=2,
    pretrained="bundled",
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    length=256,
    dtype="float32",
    eval_every=100,
    save_every=100,
    keep=1,
)
