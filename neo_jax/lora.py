"""Where configs that were written for version 0.1.0 import `LoraConfig` from."""

from neo_jax.transforms.lora import LoraConfig as LoraConfig
