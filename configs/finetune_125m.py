"""All weights of GPT-Neo 125M on a text of your own, for one accelerator or a patient CPU.

  neo-jax prepare my.txt --tokenizer EleutherAI/gpt-neo-125M --held-out 0.03 --output data
  neo-jax train finetune-125m
  neo-jax generate "It was" --model runs/finetune-125m

GPUs of Turing, such as a T4, and most CPUs multiply bfloat16 slowly: add --dtype float32 there.

cost      1.6 million tokens, 1.5e15 floating-point operations, 3.3 GB of a chip (neo-jax plan). By
          arithmetic, compiling apart: a v5e chip at least 8 seconds (plan); a T4 at half of its
          8.1 TFLOP/s in float32 6 minutes; a CPU that multiplies 0.1 TFLOP/s 4 hours, and with
          --steps 50 --batch-size 2 --length 256 --optimizer.warmup-steps 5 4 minutes
expected  a held-out loss below that of the model as it came; not run by us
"""

from neo_jax.training.config import OptimizerConfig, TrainConfig

config = TrainConfig(
    data="data",
    output="runs/finetune-125m",
    steps=200,
    batch_size=8,
    pretrained="EleutherAI/gpt-neo-125M",
    length=1024,
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=20),
    remat="full",
    eval_every=50,
    save_every=100,
)
