"""Fine-tuning for translation, from the bundled model, which knows English only.

  neo-jax prepare translation.jsonl --output data/translation --tokenizer neo_jax/bundled \
      --held-out 0.05
  neo-jax train translation
  neo-jax generate --prompts-file prompts.jsonl --model runs/translation/model --temperature 0

Lines of translation.jsonl:

  {"prompt": "English: The sea was calm.\nFrench:", "completion": " La mer était calme."}

cost      at most 1.0 million tokens, which two CPU cores read in minutes
expected  it shows the way: a model so small learns the form and little more; not run by us. For
          use, --pretrained EleutherAI/gpt-neo-1.3B and data prepared with its tokenizer
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/translation",
    output="runs/translation",
    steps=500,
    batch_size=8,
    pretrained="bundled",
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=50),
    length=256,
    eval_every=100,
    save_every=100,
)
