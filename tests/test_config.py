"""config.py: the shape of a model, and the way to and from Hugging Face's config.json."""

import dataclasses
import json
import re
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPTNeoConfig
from transformers.activations import ACT2FN

from neo_jax.checkpoints import mesh_tf
from neo_jax.config import PRESETS, ModelConfig, preset
from neo_jax.errors import NeoError, NeoWarning
from neo_jax.files.json_text import read_json
from neo_jax.ops.gelu import ACTIVATIONS

# What the hub holds for EleutherAI/gpt-neo-1.3B, stale fields included.
PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPTNeoForCausalLM"],
    "attention_dropout": 0,
    "attention_layers": ["global", "local"] * 12,
    "attention_types": [[["global", "local"], 12]],
    "bos_token_id": 50256,
    "embed_dropout": 0,
    "eos_token_id": 50256,
    "gradient_checkpointing": False,
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": None,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neo",
    "num_heads": 16,
    "num_layers": 24,
    "resid_dropout": 0,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "tokenizer_class": "GPT2Tokenizer",
    "transformers_version": "4.9.0.dev0",
    "use_cache": True,
    "vocab_size": 50257,
    "window_size": 256,
}
# What the hub holds for gpt2.
PUBLISHED_GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}
UNITS = (
    ("global",),
    ("local",),
    ("global", "local"),
    ("local", "global"),
    ("global", "global", "local"),
    ("global", "local", "local", "local"),
)


@st.composite
def configs(draw):
    is_gpt2 = draw(st.booleans())
    unit = ("global",) if is_gpt2 else draw(st.sampled_from(UNITS))
    heads, head_dim = draw(st.integers(1, 8)), draw(st.integers(1, 64))
    return ModelConfig(
        num_layers=len(unit) * draw(st.integers(1, 5)),
        embed_dim=heads * head_dim,
        num_heads=heads,
        mlp_dim=draw(st.integers(0, 300)),
        vocab_size=draw(st.integers(1, 60000)),
        max_length=draw(st.integers(1, 4096)),
        window_size=256 if is_gpt2 else draw(st.integers(1, 512)),
        attention_types=unit,
        activation=draw(st.sampled_from(["gelu_new", "gelu", "relu"])),
        norm_epsilon=draw(st.sampled_from([1e-5, 1e-6, 0.25])),
        eos_token_id=draw(
            st.integers(-1, 60000) | st.lists(st.integers(0, 60000), max_size=3).map(tuple)
        ),
        qkv_bias=is_gpt2,
        scale_attention=is_gpt2 and draw(st.booleans()),
        tied_head=draw(st.booleans()),
    )


@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("gpt-neo-125m", 125_198_592),
        ("gpt-neo-350m", 355_798_016),
        ("gpt-neo-1.3b", 1_315_575_808),
        ("gpt-neo-2.7b", 2_651_307_520),
        ("gpt-neo-6.7b", 6_658_011_136),
        ("gpt-neo-13b", 12_852_771_840),
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_sizes(name, num_params):
    config = preset(name)
    assert name in PRESETS
    assert config.num_params == num_params
    length, types = (1024, "gg") if "gpt2" in name else (2048, "gl")
    assert (config.vocab_size, config.max_length, config.window_size) == (50257, length, 256)
    assert "".join(kind[0] for kind in config.layer_types[:2]) == types
    assert config.mlp_dim == 4 * config.embed_dim


def test_every_preset_is_counted_above():
    assert len(PRESETS) == 11


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(NeoError, match=r"'gpt-neo-1\.2b'\. Did you mean 'gpt-neo-1\.3b'\?"):
        preset("gpt-neo-1.2b")


def test_zeros_are_derived():
    config = ModelConfig(embed_dim=96, num_heads=6)
    assert (config.head_dim, config.mlp_dim) == (16, 384)
    assert ModelConfig(embed_dim=96, num_heads=6, mlp_dim=100).mlp_dim == 100


def test_a_pattern_is_kept_as_its_unit():
    written_out = ModelConfig(num_layers=6, attention_types=("global", "global", "local") * 2)
    unit = ModelConfig(num_layers=6, attention_types=("global", "global", "local"))
    assert written_out == unit
    assert hash(written_out) == hash(unit)
    assert unit.layer_types == ("global", "global", "local") * 2
    assert [unit.window(i) for i in range(6)] == [None, None, 256] * 2


@given(configs())
@settings(max_examples=50)
def test_round_trip(config):
    fields = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(fields) == config


@given(configs())
@settings(max_examples=20)
def test_transformers_reads_the_same_shape(config):
    if config.family.name == "gpt2":
        theirs = GPT2Config.from_dict(config.to_hf())
        assert theirs.num_hidden_layers == config.num_layers
    else:
        theirs = GPTNeoConfig.from_dict(config.to_hf())
        assert tuple(theirs.attention_layers) == config.layer_types
    assert ModelConfig.from_hf(theirs.to_dict()) == config


def test_a_published_file_is_the_preset():
    assert ModelConfig.from_hf(PUBLISHED) == preset("gpt-neo-1.3b")
    assert ModelConfig.from_hf(PUBLISHED_GPT2) == preset("gpt2")


def test_what_gpt2_may_leave_out_and_what_it_may_say():
    fields = {"model_type": "gpt2", "n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
    config = ModelConfig.from_hf(fields | {"eos_token_id": 50256})
    assert config == preset("distilgpt2")
    other = fields | {"n_inner": 100, "scale_attn_weights": False, "tie_word_embeddings": False}
    config = ModelConfig.from_hf(other)
    assert (config.mlp_dim, config.scale_attention, config.tied_head) == (100, False, False)
    assert (config.family.name, config.eos_token_id) == ("gpt2", -1)
    for change, message in (
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is true, which is not"),
        ({"tie_word_embeddings": "no"}, "tied_head must be true or false, not 'no'"),
        ({"n_head": 7}, "num_heads 7 x head_dim 109 is not embed_dim 768"),
        ({"n_layers": 7}, r"unknown field 'n_layers'\. Did you mean 'n_layer'\?"),
        ({"hidden_size": 3}, "'n_embd' is 768 and 'hidden_size', which is another name of it, 3"),
    ):
        with pytest.raises(NeoError, match=message):
            ModelConfig.from_hf(fields | change)
    with pytest.raises(NeoError, match="'n_embd' is missing"):
        ModelConfig.from_hf({name: v for name, v in fields.items() if name != "n_embd"})


def test_what_no_checkpoint_could_hold():
    with pytest.raises(NeoError, match="whose layers are all global"):
        ModelConfig(qkv_bias=True)
    with pytest.raises(NeoError, match="scale_attention is for GPT-2"):
        ModelConfig(scale_attention=True)


@pytest.mark.parametrize(
    ("changes", "layer_types"),
    [
        ({"attention_types": [[["global", "global", "local"], 8]]}, "ggl" * 8),
        ({"attention_types": [[["global"], 20], [["local"], 4]]}, "g" * 20 + "l" * 4),
        ({"attention_types": [[["global"], 24], [["local"], 0]]}, "g" * 24),
        ({"attention_types": None, "attention_layers": ["local"] * 24}, "l" * 24),
        ({"attention_layers": ["local"] * 24}, "l" * 24),
        ({"attention_types": None, "attention_layers": None}, "gl" * 12),
        ({}, "gl" * 12),
    ],
)
def test_every_way_to_write_a_pattern(changes, layer_types):
    bare = {name: v for name, v in PUBLISHED.items() if not name.startswith("attention_")}
    config = ModelConfig.from_hf(bare | changes)
    assert "".join(kind[0] for kind in config.layer_types) == layer_types


@pytest.mark.parametrize("fields", [PUBLISHED | {"eos_token_id": None}, None])
def test_a_vocabulary_without_an_end_of_text(fields):
    fields = fields or {name: v for name, v in PUBLISHED.items() if name != "eos_token_id"}
    config = ModelConfig.from_hf(fields)
    assert config.eos_token_id == -1
    assert config.to_hf()["eos_token_id"] is None
    assert config.eos_ids == ()


@pytest.mark.parametrize(
    ("ids", "ours", "theirs"),
    [([7, 5, 7], (7, 5), [7, 5]), ([7], 7, 7), ([], -1, None), (7, 7, 7)],
    ids=str,
)
def test_several_ids_may_end_a_text(ids, ours, theirs):
    config = ModelConfig.from_hf(PUBLISHED | {"eos_token_id": ids})
    assert config.eos_token_id == ours
    assert list(config.eos_ids) == list(dict.fromkeys(ids if isinstance(ids, list) else [ids]))
    assert config.to_hf()["eos_token_id"] == theirs
    assert hash(config) == hash(ModelConfig.from_hf(PUBLISHED | {"eos_token_id": ours}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hiden_size": 3}, r"F: unknown field 'hiden_size'\. Did you mean 'hidden_size'\?"),
        ({"model_type": "gptj"}, "F: model_type is 'gptj'; this loads 'gpt_neo' and 'gpt2'"),
        ({"model_type": "gpt2"}, "F: field 'n_layer' is missing"),
        ({"tie_word_embeddings": 1}, "F: tied_head must be true or false, not 1"),
        (
            {"num_layers": 10**12},
            "F: attention_layers are .*, not a type for each of num_layers 1000",
        ),
        (
            {"num_layers": 10**12, "attention_types": None, "attention_layers": None},
            "F: .* to 4,096",
        ),
        ({"attention_types": [[["global"], 10**12]]}, "F: attention_types are for 1000000000000 l"),
        (
            {"attention_types": [[["global"], 24]]},
            "F: attention_types and attention_layers disagree",
        ),
        ({"num_heads": 15}, "F: num_heads 15 x head_dim 136 is not embed_dim 2048: choose"),
        ({"num_layers": 23}, "F: attention_layers are .*, not a type for each of num_layers 23"),
        (
            {"num_layers": 0, "attention_types": None, "attention_layers": None},
            "F: num_layers must be a whole number from 1 to 4,096, not 0",
        ),
        ({"hidden_size": "2048"}, "F: embed_dim must be a whole number, not '2048'"),
        ({"num_heads": True}, "F: num_heads must be a whole number, not True"),
        ({"window_size": 2.5}, "F: window_size must be a whole number, not 2.5"),
        (
            {"intermediate_size": -4},
            "F: mlp_dim must be a whole number from 0 to 1.*, not -4",
        ),
        (
            {"eos_token_id": [1, -1]},
            r"F: eos_token_id must be a whole number >= -1 or a list of id",
        ),
        ({"eos_token_id": [[1]]}, "F: eos_token_id must be a whole number >= -1 or a list of ids"),
        ({"eos_token_id": True}, "F: eos_token_id must be a whole number >= -1 or a list of ids"),
        ({"layer_norm_epsilon": "1e-5"}, "F: norm_epsilon must be a number, not '1e-5'"),
        ({"layer_norm_epsilon": -1e-5}, "F: norm_epsilon must lie between 0 and 1, not be -1e-05"),
        ({"activation_function": "gelu_neu"}, "'gelu_neu'. Did you mean 'gelu_new'?"),
        (
            {"attention_layers": ["globl"] * 24, "attention_types": None},
            "'globl'. Did you mean 'gl",
        ),
        ({"attention_types": [[["global"], 0]]}, "F: attention_types are for 0 layers"),
        ({"attention_types": 7}, "F: attention_types are 7, not units and how often they repeat"),
        (
            {"attention_types": ["global", "local"]},
            r'are a flat list, .*; write .* as in \[\[\["global", "local"\], 12\]\]\.',
        ),
        (
            {"attention_types": ["global", "local", "local"] * 8},
            r'are a flat list, .*; write .* as in \[\[\["global", "local", "local"\], 8\]\]\.',
        ),
        ({"attention_types": [[["global"], "2"]]}, r"are \[\[\['global'\], '2'\]\], not units"),
        ({"attention_layers": 5}, "F: attention_layers are 5, not a type for each"),
        ({"activation_function": [[]]}, r"F: unknown activation \[\[\]\]"),
        ({"activation_function": "quick_gelu"}, "F: unknown activation 'quick_gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "F: the weights are quantized"),
    ],
)
def test_errors_name_the_file_and_the_mend(changes, message):
    with pytest.raises(NeoError, match=message):
        ModelConfig.from_hf(PUBLISHED | changes, source="F")


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_heads", "vocab_size"])
def test_missing_fields(name):
    fields = {key: value for key, value in PUBLISHED.items() if key != name}
    with pytest.raises(NeoError, match=f"config.json: field '{name}' is missing; is the file"):
        ModelConfig.from_hf(fields)


@pytest.mark.parametrize(
    ("published", "sizes"),
    [
        (PUBLISHED, "hidden_size num_layers num_heads max_position_embeddings window_size"),
        (PUBLISHED_GPT2, "n_embd n_layer n_head n_positions"),
    ],
)
def test_null_is_refused_where_it_is_no_value(published, sizes):
    """A default in its place would be another model: "num_heads": null was 12 heads."""
    config, refused = ModelConfig.from_hf(published), set()
    for name in published:
        try:
            found = ModelConfig.from_hf(published | {name: None})
        except NeoError as error:
            says = re.search("'?([a-z_]+)'? is (null; give its value|None)", str(error))
            refused.add(says[1] == name and name)
        else:
            assert dataclasses.replace(found, eos_token_id=50256) == config
    always = "model_type layer_norm_epsilon activation_function vocab_size"
    assert refused == {*always.split(), *sizes.split()}


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 10**9},
        {"vocab_size": 10**12},
        {"max_length": 10**12},
        {"window_size": 2**31},
        {"window_size": 10**4000},
        {"window_size": 10**9999},
        {"embed_dim": 10**9, "num_heads": 1},
        {"embed_dim": 2**20, "mlp_dim": 2**30, "num_heads": 1},
    ],
    ids=lambda sizes: next(iter(sizes)),
)
def test_absurd_sizes_are_refused_by_arithmetic(sizes):
    tracemalloc.start()
    with pytest.raises(NeoError, match=r"more than|must be a whole number from 1 to"):
        ModelConfig(**sizes)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_layers_are_counted_before_they_are_written_out():
    """A file of 100 KB named 10^8 of them, and took 1.5 GB before it was refused."""
    unit = [[["global"] * 10_000, 10_000]]
    sizes = {"n_layer": 10**8, "n_embd": 8, "n_head": 2, "n_vocab": 9, "n_ctx": 8}
    tracemalloc.start()
    with pytest.raises(NeoError, match="num_layers 100000000 is more than 4,096"):
        ModelConfig.from_hf(
            PUBLISHED | {"num_layers": 10**8, "attention_types": unit, "attention_layers": None}
        )
    for types in ({"attention_types": unit}, {}):
        with pytest.raises(NeoError, match="num_layers 100000000 is more than 4,096"):
            mesh_tf.model_config(sizes | types, "F")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("name", "ours"),
    [("gelu_pytorch_tanh", "gelu_new"), ("gelu_fast", "gelu_new"), ("gelu_accurate", "gelu_new"),
     ("gelu_python_tanh", "gelu_new"), ("gelu_python", "gelu"), ("relu", "relu"),
     ("silu", "silu"), ("swish", "silu")],
)  # fmt: skip
def test_other_names_of_activations(name, ours):
    """The functions are the same, to what float32 tells apart."""
    config = ModelConfig.from_hf(PUBLISHED | {"activation_function": name})
    assert config.activation == ours
    x = torch.linspace(-5, 5, 1001, dtype=torch.float64)
    expected = ACT2FN[name](x)
    found = ACTIVATIONS[ours](x.float().numpy())
    torch.testing.assert_close(ACT2FN[ours](x), expected, atol=1e-7, rtol=0)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


STALE = {"output_past": True, "eos_token_ids": 0, "quantization_config": None, "xla_device": None}
STALE |= {"torch_dtype": "float16", "_name_or_path": "x", "_flash": 1, "top_k": 3, "rotary": None}
STALE |= {"num_hidden_layers": 24, "num_attention_heads": 16, "window_sizes": 256}


def test_stale_fields_change_nothing():
    assert ModelConfig.from_hf(PUBLISHED | STALE) == preset("gpt-neo-1.3b")


def test_fields_that_transformers_does_not_know_are_named_in_a_warning():
    others = {"rotary": True, "n_ctx": 1, "trained_by": {"x": 1}}
    with pytest.warns(NeoWarning) as found:
        config = ModelConfig.from_hf(PUBLISHED | STALE | others, "F")
    assert config == preset("gpt-neo-1.3b")
    assert "F: not followed: 'rotary', 'n_ctx', 'trained_by', no field" in str(found[0].message)
    assert len(found) == 1


def test_transformers_reads_the_same_by_other_names():
    """What GPT2Config.attribute_map and GPTNeoConfig.attribute_map list."""
    for kind, published in ((GPT2Config, PUBLISHED_GPT2), (GPTNeoConfig, PUBLISHED)):
        assert kind.attribute_map == ModelConfig.from_hf(published).family.aliases
        names = {theirs: name for name, theirs in kind.attribute_map.items()}
        fields = {names.get(name, name): value for name, value in published.items()}
        assert ModelConfig.from_hf(fields) == ModelConfig.from_hf(published)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(ModelConfig)])
def test_every_field_is_checked(name):
    with pytest.raises(NeoError, match="unknown" if name == "activation" else name):
        dataclasses.replace(preset("gpt-neo-125m"), **{name: () if "types" in name else -2})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON .* is the file whole"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, r"is not valid JSON \(nested too deep\)"),
        (b'{"a":' * 100_000, r"is not valid JSON \(nested too deep\)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON .*digits"),
        (b"[" + b"1," * 1_000_000 + b"1]", "holds a list, not a JSON object"),
        (b" " * 10_000_001, "holds more than 10 MB of JSON"),
        (b"\xef\xbb\xbf{}", "is not valid JSON"),
    ],
    ids=lambda value: str(value[:12]),
)
def test_files_that_hold_no_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(NeoError, match=message):
        read_json(path)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(NeoError, match=r"cannot read .*nothing\.json: No such file"):
        read_json(tmp_path / "nothing.json")
