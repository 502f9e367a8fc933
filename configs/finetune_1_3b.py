"""All weights of GPT-Neo 1.3B on texts of your own. For the eight chips of a v5litepod-8.

  neo-jax prepare my_texts/ --output data/mine --tokenizer gpt-neo-1.3b --held-out 0.01
  neo-jax train finetune-1.3b

cost      33 million tokens; a chip holds 2.6 GB of weights, gradients and moments of 1.3 billion
          parameters in float32, and four sequences at a time
expected  a held-out loss below that of the model as it came; not run by us
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data/mine",
    output="runs/finetune-1.3b",
    steps=250,
    batch_size=64,
    pretrained="EleutherAI/gpt-neo-1.3B",
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup_steps=25),
    remat="full",
    accumulation=2,
    mesh="fsdp=8",
    eval_every=50,
    save_every=125,
)
