"""What differs between GPT-Neo and GPT-2, as data: Hugging Face's fields, and the presets."""

from typing import Any

SAME_ACTIVATIONS = {
    "gelu_python": "gelu",
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu_fast"), "gelu_new"
    ),
}
HF_FIELDS: dict[str, dict[str, str]] = {
    "gpt_neo": {
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
    "gpt2": {
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
}
HF_STALE = {
    "gpt_neo": frozenset(["attention_dropout", "embed_dropout", "resid_dropout"]),
    "gpt2": frozenset(
        """n_ctx attn_pdrop embd_pdrop resid_pdrop predict_special_tokens n_special
        scale_attn_by_inverse_layer_idx reorder_and_upcast_attn""".split()
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

GPT2: dict[str, Any] = {
    "attention_types": ("global",), "max_length": 1024, "qkv_bias": True,
    "scale_attention": True,
}  # fmt: skip
PRESET_FIELDS: dict[str, dict[str, Any]] = {
    "gpt-neo-125m": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
    "gpt-neo-350m": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
    "gpt-neo-1.3b": {"num_layers": 24, "embed_dim": 2048, "num_heads": 16},
    "gpt-neo-2.7b": {"num_layers": 32, "embed_dim": 2560, "num_heads": 20},
    "gpt-neo-6.7b": {"num_layers": 32, "embed_dim": 4096, "num_heads": 32},
    "gpt-neo-13b": {"num_layers": 40, "embed_dim": 5120, "num_heads": 40},
    "distilgpt2": {"num_layers": 6, "embed_dim": 768, "num_heads": 12},
    "gpt2": {"num_layers": 12, "embed_dim": 768, "num_heads": 12},
    "gpt2-medium": {"num_layers": 24, "embed_dim": 1024, "num_heads": 16},
    "gpt2-large": {"num_layers": 36, "embed_dim": 1280, "num_heads": 20},
    "gpt2-xl": {"num_layers": 48, "embed_dim": 1600, "num_heads": 25},
}
