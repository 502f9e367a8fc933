"""Adapters of GPT-Neo 2.7B on texts of your own. For one v5e chip.

  neo-jax prepare my_texts/ --output data/mine --tokenizer gpt-neo-2.7b --held-out 0.01
  neo-jax train lora-2.7b
  neo-jax generate "It was" --model runs/lora-2.7b

cost      16 million tokens; the chip holds 5.3 GB of frozen weights in bfloat16, adapters of 10
          million parameters, and one sequence at a time
expected  a held-out loss below that of the model as it came; not run by us
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig
from neo_jax.transforms.lora import LoraConfig

config = TrainConfig(
    data="data/mine",
    output="runs/lora-2.7b",
    steps=500,
    batch_size=16,
    pretrained="EleutherAI/gpt-neo-2.7B",
    lora=LoraConfig(rank=16, alpha=32.0, targets=("q_proj", "k_proj", "v_proj", "out_proj")),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=50),
    remat="full",
    accumulation=16,
    eval_every=100,
    save_every=100,
)
