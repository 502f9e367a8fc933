"""Fine-tuning for summaries of texts, from the bundled model.

  neo-jax prepare summaries.jsonl --output data/summaries --tokenizer neo_jax/bundled \
      --held-out 0.05
  neo-jax train summaries
  neo-jax generate --prompts-file prompts.jsonl --model runs/summaries/model --temperature 0

Lines of summaries.jsonl, whose texts and summaries fit 1024 tokens together:

  {"prompt": "The Senate met at noon and ... \n\nSummary:", "completion": " The Senate met."}

cost      at most 4.1 million tokens, which two CPU cores read in a quarter of an hour or so
expected  it shows the way: a model so small learns the form and little more; not run by us. For
          use, --pretrained EleutherAI/gpt-neo-1.3B and data prepared with its tokenizer
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/summaries",
    output="runs/summaries",
    steps=500,
    batch_size=8,
    pretrained="bundled",
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50),
    length=1024,
    dropout=0.1,
    eval_every=100,
    save_every=100,
)
