"""Minutes of a sitting in one sentence: a recipe, for the bundled model on a CPU.

  neo-jax recipe summaries

Lines of --examples and --test-examples, in the place of those that are made:

  {"prompt": "The Senate met at nine ...\nSummary:", "completion": " The Senate passed ..."}

cost      410,000 tokens; two CPU cores alone five minutes (1,500 tokens/s)
expected  ROUGE-L 86.9, 19 % word for word, of 200; the answer to the likest prompt has 80.1 and
          6.5 %: it knows who decided and how, and takes the wrong bill at times

A published model, on examples of yours and one v5e chip:

  neo-jax recipe summaries --examples train.jsonl --test-examples test.jsonl --output runs/mine \
      --pretrained EleutherAI/gpt-neo-1.3B --lora.rank 16 --optimizer.learning-rate 2e-4 \
      --length 1024 --batch-size 8 --accumulation 4 --remat full --dtype bfloat16 \
      --steps 2000 --max-new-tokens 128

cost      16 million tokens, 2000 steps of at least 0.30 s and 3.6 GB of the chip (neo-jax plan): at
          least 10 minutes, compiling and answers apart
expected  not run by us
"""

from neo_jax.evaluation.recipes import Recipe
from neo_jax.training.config import OptimizerConfig, TrainConfig

recipe = Recipe(task="summaries", metrics=("rouge_l", "exact_match"), max_new_tokens=40)
config = TrainConfig(
    data="runs/summaries/data",
    output="runs/summaries",
    steps=400,
    batch_size=4,
    pretrained="bundled",
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    length=256,
    dtype="float32",
    eval_every=100,
    save_every=100,
    keep=1,
)
