"""What differs between GPT-Neo and GPT-2, as data: fields, names of tensors, scales, presets.

Sizes of the presets: README of EleutherAI/gpt-neo and its `configs/` folder; GPT-2's paper.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

Scale = Callable[[Any], float]
"""Returns the standard deviation with which a kernel is drawn in a model of a `ModelConfig`."""


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: how Hugging Face describes it, and how its parameters are called and drawn.

    Blocks differ by fields of the config; nothing else asks which family a model is.
    """

    name: str  # Hugging Face's model_type
    architecture: str  # its class in transformers
    prefix: str  # of its other classes there
    fields: Mapping[str, str]  # of its config.json, with ours
    aliases: Mapping[str, str]  # other names of its fields: transformers' attribute_map
    layer_fields: tuple[str, ...]  # those that say the attention type of each layer, if any
    off: Mapping[str, float]  # fields to write for what these models do in training only
    ignored: frozenset[str]  # fields of older files that change nothing
    defaults: Mapping[str, Any]  # our fields that all its models share
    # A module by our path, where Hugging Face's is another: its path, and the part of it where
    # several of ours are one.
    modules: Mapping[str, str | tuple[str, int]]
    transposed: bool  # kernels are [inputs, outputs] in Hugging Face's checkpoints for PyTorch
    mesh_tf: Mapping[str, str]  # a parameter by our path: Mesh-TensorFlow's name; none without
    adapter_words: int  # of the path of a module that PEFT needs to tell it from others of a layer
    scales: Mapping[str, Scale]  # by the kernel's name; "" is any other
    presets: Mapping[str, Mapping[str, int]]  # our fields of each released model


GPT_NEO = Family(
    name="gpt_neo",
    architecture="GPTNeoForCausalLM",
    prefix="GPTNeo",
    fields={
        "num_layers": "num_layers",
        "hidden_size": "embed_dim",
        "num_heads": "num_heads",
        "intermediate_size": "mlp_dim",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "max_length",
        "window_size": "window_size",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_epsilon",
        "eos_token_id": "eos_token_id",
        "tie_word_embeddings": "tied_head",
    },
    aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    layer_fields=("attention_types", "attention_layers"),
    off={"attention_dropout": 0.0, "embed_dropout": 0.0, "resid_dropout": 0.0},
    ignored=frozenset(),
    defaults={},
    modules={
        f"attn/{name}": f"attn.attention.{name}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    },
    transposed=False,
    mesh_tf={
        "wte/embedding": "wte",
        "wpe/embedding": "wpe",
        "ln_1/scale": "norm_1/g",
        "ln_1/bias": "norm_1/b",
        "attn/q_proj/kernel": "attn/q",
        "attn/k_proj/kernel": "attn/k",
        "attn/v_proj/kernel": "attn/v",
        "attn/out_proj/kernel": "attn/o",
        "attn/out_proj/bias": "attn/compute_output_bias/o_b",
        "ln_2/scale": "norm_2/g",
        "ln_2/bias": "norm_2/b",
        "mlp/c_fc/kernel": "mlp/conv1d_main/c_fc/kernel",
        "mlp/c_fc/bias": "mlp/conv1d_main/c_fc/bias",
        "mlp/c_proj/kernel": "mlp/conv1d_main/c_proj/kernel",
        "mlp/c_proj/bias": "mlp/conv1d_main/c_proj/bias",
        "ln_f/scale": "ln_f/g",
        "ln_f/bias": "ln_f/b",
    },
    adapter_words=1,
    scales={  # Mesh-TensorFlow's, which keep the unscaled logits near unit variance
        "q_proj": lambda config: (config.embed_dim * config.head_dim) ** -0.5,
        "c_fc": lambda config: 0.02,
        "c_proj": lambda config: 0.02 * config.num_layers**-0.5,
        "": lambda config: config.embed_dim**-0.5,
    },
    presets={
        "gpt-neo-125m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
        "gpt-neo-350m": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
        "gpt-neo-1.3b": {"num_layers": 24, "embed_dim": 2048, "num_heads": 16},
        "gpt-neo-2.7b": {"num_layers": 32, "embed_dim": 2560, "num_heads": 20},
        "gpt-neo-6.7b": {"num_layers": 32, "embed_dim": 4096, "num_heads": 32},
        "gpt-neo-13b": {"num_layers": 40, "embed_dim": 5120, "num_heads": 40},
    },
)

_ENDS_BRANCH: Scale = lambda config: 0.02 * (2 * config.num_layers) ** -0.5  # noqa: E731
GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="GPT2",
    fields={
        "n_layer": "num_layers",
        "n_embd": "embed_dim",
        "n_head": "num_heads",
        "n_inner": "mlp_dim",
        "vocab_size": "vocab_size",
        "n_positions": "max_length",
        "activation_function": "activation",
        "layer_norm_epsilon": "norm_epsilon",
        "eos_token_id": "eos_token_id",
        "scale_attn_weights": "scale_attention",
        "tie_word_embeddings": "tied_head",
    },
    aliases={
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
    },
    layer_fields=(),
    off={"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ignored=frozenset(
        """n_ctx predict_special_tokens n_special scale_attn_by_inverse_layer_idx
        reorder_and_upcast_attn""".split()
    ),
    defaults={
        "attention_types": ("global",),
        "max_length": 1024,
        "qkv_bias": True,
        "scale_attention": True,
    },
    modules={
        "attn/q_proj": ("attn.c_attn", 0),
        "attn/k_proj": ("attn.c_attn", 1),
        "attn/v_proj": ("attn.c_attn", 2),
        "attn/out_proj": "attn.c_proj",
    },
    transposed=True,
    mesh_tf={},
    adapter_words=2,  # two end in c_proj
    scales={  # Radford et al., "Language models are unsupervised multitask learners", 2.3
        "out_proj": _ENDS_BRANCH,
        "c_proj": _ENDS_BRANCH,
        "": lambda config: 0.02,
    },
    presets={
        "distilgpt2": {"num_layers": 6, "embed_dim": 768, "num_heads": 12},
        "gpt2": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
        "gpt2-medium": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
        "gpt2-large": {"num_layers": 36, "embed_dim": 1280, "num_heads": 20},
        "gpt2-xl": {"num_layers": 48, "embed_dim": 1600, "num_heads": 25},
    },
)

FAMILIES = {family.name: family for family in (GPT_NEO, GPT2)}

SAME_ACTIVATIONS = {
    "gelu_python": "gelu",
    "swish": "silu",
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"), "gelu_new"
    ),
}

# Fields of published config.json files that say nothing about the forward pass of a causal
# language model: bookkeeping of transformers, training-time settings, other heads.
HF_IGNORED = frozenset(
    """
    model_type architectures transformers_version torch_dtype dtype use_cache bos_token_id
    pad_token_id sep_token_id cls_token_id decoder_start_token_id initializer_range
    classifier_dropout gradient_checkpointing tokenizer_class task_specific_params id2label
    label2id num_labels
    summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj output_attentions output_hidden_states return_dict is_encoder_decoder
    is_decoder add_cross_attention chunk_size_feed_forward problem_type prefix pruned_heads
    torchscript use_bfloat16 use_return_dict finetuning_task max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    bad_words_ids num_return_sequences output_scores return_dict_in_generate forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens tf_legacy_loss cross_attention_hidden_size attn_implementation
    tie_encoder_decoder unsloth_version quantization_config output_past eos_token_ids
    """.split()
)
