"""Adapters (LoRA) for answers to questions, from the bundled model.

  neo-jax prepare questions.jsonl --output data/questions --tokenizer neo_jax/bundled \
      --held-out 0.05
  neo-jax train questions
  neo-jax generate --prompts-file prompts.jsonl --model runs/questions/adapter --temperature 0

Lines of questions.jsonl; only answers are learned:

  {"prompt": "Question: Who hunted the whale?\nAnswer:", "completion": " Captain Ahab."}

cost      at most 1.0 million tokens, which two CPU cores read in minutes
expected  it shows the way: a model so small learns the form and little more; not run by us. For
          use, --pretrained EleutherAI/gpt-neo-1.3B and data prepared with its tokenizer
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.transforms.lora import LoraConfig

config = TrainConfig(
    data="data/questions",
    output="runs/questions",
    steps=500,
    batch_size=8,
    pretrained="bundled",
    lora=LoraConfig(rank=8, targets=("q_proj", "v_proj", "c_fc", "c_proj")),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    length=256,
    eval_every=100,
    save_every=100,
)
