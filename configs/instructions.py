"""Following instructions about words: a recipe, for the bundled model on a CPU.

  neo-jax recipe instructions

Lines of --examples and --test-examples, in the place of those that are made:

  {"prompt": "Instruction: ...\nInput: ...\nResponse:", "completion": " ..."}

cost      768,000 tokens; two CPU cores alone nine minutes (1,500 tokens/s)
expected  34 % word for word, ROUGE-L 49.3, of 200; the answer to the likest prompt has 9.5 % and
          29.3: it does what is requested, but often takes the wrong word

A published model, on examples of yours and one v5e chip:

  neo-jax recipe instructions --examples train.jsonl --test-examples test.jsonl --output runs/mine \
      --pretrained EleutherAI/gpt-neo-1.3B --lora.rank 16 --optimizer.learning-rate 2e-4 \
      --length 256 --batch-size 32 --accumulation 4 --remat full --dtype bfloat16 \
      --steps 2000 --max-new-tokens 256

cost      16 million tokens, 2000 steps of at least 0.29 s and 3.6 GB of the chip (neo-jax plan): at
          least 10 minutes, compiling and answers apart
expected  not run by us
"""

from neo_jax.evaluation.recipes import Recipe
from neo_jax.training.config import OptimizerConfig, TrainConfig

recipe = Recipe(task="instructions", metrics=("exact_match", "rouge_l"), max_new_tokens=32)
config = TrainConfig(
    data="runs/instructions/data",
    output="runs/instructions",
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
