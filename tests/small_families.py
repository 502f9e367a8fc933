"""A small model of each family as transformers has it, and tokens for it: what adapters are for."""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoConfig, GPTNeoForCausalLM

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 24))
FAMILIES = {
    "neo": (GPTNeoForCausalLM, GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=2, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=8)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
}  # fmt: skip


def write_bases(root, size):
    """Writes a folder of each family, its parameters drawn and then moved by numbers of a size."""
    for name, (kind, config) in FAMILIES.items():
        torch.manual_seed(0)
        model = kind(config)
        disturb(model, size)
        model.save_pretrained(root / name)
    return root


def read_base(root, family):
    """Reads one of them."""
    return FAMILIES[family][0].from_pretrained(root / family, attn_implementation="eager")


def disturb(model, size):
    """Adds random numbers of a size to all that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=size)
