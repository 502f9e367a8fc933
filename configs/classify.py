"""A classifier of texts on examples with labels, for a CPU or one accelerator.

  neo-jax prepare train.tsv --text-field sentence --label-field label --tokenizer bundled \
      --held-out 0.1 --output examples
  neo-jax train classify
  neo-jax classify "a warm and funny film" --model runs/classify

`--pretrained EleutherAI/gpt-neo-125M --optimizer.learning-rate 5e-5` makes one of a larger model,
with data that was prepared with its tokenizer. The best epoch on what is held out is kept.

cost      for each epoch of 600 sentences about 20 seconds of two CPU cores
expected  what docs/classify.md says of SST-2
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="examples",
    output="runs/classify",
    steps=0,
    epochs=5,
    patience=2,
    batch_size=16,
    pretrained="bundled",
    length=128,
    optimizer=OptimizerConfig(
        learning_rate=3e-4, warmup_steps=20, schedule="linear", final_fraction=0.0, beta2=0.999,
        weight_decay=0.01,
    ),
    dtype="float32",
    dropout=0.1,
    save_every=1000,
    keep=1,
)  # fmt: skip
