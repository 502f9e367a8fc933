"""text/language_model.py: what `neo_jax.load` gives, with and without a tokenizer."""

import copy
import dataclasses
import inspect
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.experimental.layout import Format, Layout
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax.checkpoints import load
from neo_jax.config import preset
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import make_sharding
from neo_jax.text import inspection
from neo_jax.text.score import score_ids
from neo_jax.text.tokenizer import BytePairTokenizer, SentencePieceTokenizer

PROMPTS = ["The quick brown", "Call me", "naïve café in 日"]
NEW = 20


@pytest.fixture(scope="module")
def models(checkpoints):
    return {name: neo_jax.load(folder) for name, folder in checkpoints.items()}


@pytest.fixture(params=["pieces", "bytes"])
def lm(models, request):
    return models[request.param]


@pytest.fixture(scope="module")
def one(models):
    return models["bytes"]


@pytest.fixture(scope="module")
def bare(models):
    return models["bare"]


def refused(call, *args, **options):
    with pytest.raises(NeoError) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_prompt_begins_as_the_files_of_the_tokenizer_say(checkpoints, tmp_path):
    """And what is scored; texts of the harness, which begins them itself, do not."""
    folder = shutil.copytree(checkpoints["bytes"], tmp_path / "model")
    fields = json.loads((folder / "tokenizer.json").read_text())
    begin, text = "<|endoftext|>", {"Sequence": {"id": "A", "type_id": 0}}
    fields["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, text],
        "pair": [text],
        "special_tokens": {begin: {"id": begin, "ids": [0], "tokens": [begin]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    lm = neo_jax.load(folder)
    assert lm.encode("The fox") == [0, *lm.tokenizer.encode("The fox")]
    assert lm.encode("The fox", add_special_tokens=False) == lm.tokenizer.encode("The fox")


def test_the_parts_are_there(checkpoints, models):
    for name, kind in (("pieces", SentencePieceTokenizer), ("bytes", BytePairTokenizer)):
        lm = models[name]
        assert isinstance(lm.tokenizer, kind)
        assert lm.config is lm.model.config
        assert (lm.config.vocab_size, lm.config.eos_token_id) == (327, lm.tokenizer.eos_id)
        assert lm.folder == checkpoints[name]
        assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {"float32"}
    assert models["bare"].tokenizer is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kernel": "fast"},
            "kernel must be 'auto', 'dense', 'single', 'blocked', 'splash', 'splash-256', "
            "'splash-1024' or 'cudnn', not 'fast'",
        ),
        ({"quantize": None}, "quantize must be 'none' or 'int8', not None"),
        ({"cache_dtype": 4}, "cache_dtype must be 'auto', 'float32', 'bfloat16', 'float16' or"),
        ({"dtype": "half"}, "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not"),
        ({"mesh": 5}, "mesh must be a text, not 5"),
        ({"mesh": "model=2", "rules": ["embed"]}, "rules must be a text, not ['embed']"),
        ({"sharding": "tensor"}, "sharding is what `make_sharding` returns, not 'tensor'"),
    ],
)
def test_what_load_does_not_know(checkpoints, options, message):
    assert refused(neo_jax.load, checkpoints["bare"], **options).startswith(message)
    assert "a model is named by a folder or a hub name, not by 5" in refused(neo_jax.load, 5)


def test_text_lists_and_ids_are_continued_alike(lm):
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        texts = lm.generate(PROMPTS, NEW, **options)
        assert lm.generate(PROMPTS[0], NEW, **options) == texts[0]
        assert lm.generate([*ids[:2], PROMPTS[2]], NEW, **options) == texts
        assert all(texts)
    assert lm.generate([], NEW) == []


def test_the_new_text_is_what_the_prompt_and_the_ids_decode_to(lm):
    for sample in lm.sample(PROMPTS, NEW, num_samples=4, sampling=SamplingOptions(1.0)):
        prompt = lm.encode(sample.prompt)
        whole, start = lm.tokenizer.decode(prompt + sample.ids), lm.tokenizer.decode(prompt)
        assert start.rstrip("\ufffd") + sample.text == whole


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 2}, {"top_p": 1.0, "seed": 2}])
def test_a_stream_joined_is_what_generate_gives(lm, options):
    for prompt in (*PROMPTS, lm.encode(PROMPTS[1])):
        pieces = list(lm.stream(prompt, NEW, **options))
        assert len(pieces) > 3
        assert all(pieces)
        assert "".join(pieces) == lm.generate([prompt], NEW, **options)[0]


def test_samples_of_a_prompt_have_seeds_in_a_row(lm):
    options = SamplingOptions(temperature=1.0, top_p=1.0, seed=2**32 - 2)
    many = lm.sample(PROMPTS[:2], NEW, num_samples=3, sampling=options)
    assert [sample.prompt for sample in many] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({tuple(sample.ids) for sample in many}) == 6
    for i, seed in ((0, 2**32 - 2), (1, 2**32 - 1), (2, 0)):
        alone = dataclasses.replace(options, seed=seed)
        assert lm.sample(PROMPTS[1:2], NEW, sampling=alone)[0].ids == many[3 + i].ids
    for sample in many:
        assert sample.finish_reason in ("eos", "length")
        assert len(sample.logprobs) == len(sample.ids) <= NEW
        assert max(sample.logprobs) <= 0


# Scores.


def test_scores_are_token_logprobs_and_their_sums(lm, text):
    line = text.splitlines()[0]
    ids = lm.encode(line)
    score, again = lm.score([line, ids])
    expected = next(score_ids(lm.model, lm.params, [ids, ids]))
    np.testing.assert_array_equal(score.logprobs, expected)
    assert score.ids == again.ids == ids
    assert score.loss == pytest.approx(-expected.astype(float).mean(), rel=1e-6)
    first = lm.tokenizer.decode(ids[:1])
    assert line.startswith(first)
    assert score.num_bytes == again.num_bytes == len(line) - len(first)  # ASCII
    bits = -expected.astype(float).sum() / math.log(2) / (len(line) - len(first))
    assert score.bits_per_byte == pytest.approx(bits, rel=1e-6)


def test_bytes_of_the_text_beyond_its_first_token_are_counted(lm):
    line = "the café 日本"
    score = lm.score([line])[0]
    first = lm.tokenizer.decode(score.ids[:1])
    assert score.num_bytes == len(line.encode()) - len(first.encode())
    assert len(line.encode()) == len(line) + 5


@pytest.mark.parametrize("text", ["é", "日", "🙂"])
def test_a_first_character_of_several_tokens_is_counted_whole(models, text):
    lm = models["bytes"]
    score = lm.score([text + "x"])[0]
    assert lm.tokenizer.decode(score.ids[:1]) == "\ufffd"
    assert score.num_bytes == len(text.encode()) + 1
    assert score.bits_per_byte > 0


def test_a_single_token_has_nothing_to_score(lm):
    score = lm.score([[7]])[0]
    assert score.logprobs.shape == (0,)
    assert math.isnan(score.loss)
    assert math.isnan(score.bits_per_byte)


def test_scores_come_one_at_a_time_and_take_a_stride(lm, text):
    long = lm.encode(text)
    assert len(long) > lm.config.max_length
    near, far = (next(lm.scores([long], stride)).logprobs for stride in (8, 60))
    expected = next(score_ids(lm.model, lm.params, [long], 8))
    np.testing.assert_allclose(near, expected, rtol=0, atol=1e-5)
    assert np.abs(near - far).max() > 0.1


# Features.


@pytest.mark.parametrize("layer", [0, 1], ids=["global", "local"])
def test_attention_is_that_of_transformers(checkpoints, models, layer):
    folder, lm = checkpoints["bytes"], models["bytes"]
    ids = np.random.default_rng(0).integers(0, 327, 41).tolist()  # five windows and one
    reference = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    single, double = [
        run(torch.tensor([ids]), output_attentions=True).attentions[layer][0].detach().numpy()
        for run in (copy.deepcopy(reference), reference.double())
    ]
    ours = lm.attention(ids, layer)
    assert ours.dtype == np.float32
    assert np.abs(ours - double).max() <= 2 * np.abs(single - double).max() + 2e-6
    visible = (ours > 0).sum(-1)
    assert visible.max() == (8 if lm.config.layer_types[layer] == "local" else 41)
    np.testing.assert_allclose(ours.sum(-1), 1, atol=1e-6)


def test_attention_on_a_mesh_and_what_it_refuses(checkpoints, models):
    split = neo_jax.load(checkpoints["bytes"], mesh="data=2,fsdp=2,model=2")
    expected = models["bytes"].attention(PROMPTS[0], 1)
    np.testing.assert_allclose(split.attention(PROMPTS[0], 1), expected, atol=1e-5)  # as features
    assert refused(split.attention, "text", 2) == "layer 2 is not one of 0 to 1."
    assert "65 tokens exceed the context of 64" in refused(split.attention, [1] * 65, 0)


def test_features_are_the_hidden_states_of_transformers(checkpoints, models):
    reference = GPTNeoForCausalLM.from_pretrained(
        checkpoints["bytes"], attn_implementation="eager"
    ).eval()
    lm = models["bytes"]
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    for layer in (*range(lm.config.num_layers + 1), -1):
        features = lm.embed([*PROMPTS, ids[0]], layer=layer)
        for row, feature in zip([*ids, ids[0]], features, strict=True):
            with torch.no_grad():
                states = reference(torch.tensor([row]), output_hidden_states=True).hidden_states
            assert feature.shape == (len(row), lm.config.embed_dim)
            assert feature.dtype == np.float32
            expected = states[layer][0].numpy()
            np.testing.assert_allclose(
                feature, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
            )


def test_features_that_do_not_exist(lm):
    for layer in (3, -4):
        assert f"layer {layer} is not one of 0 to 2, or -1" in refused(
            lm.embed, ["text"], layer=layer
        )
    assert "65 tokens exceed the context of 64" in refused(lm.embed, [[1] * 65])
    assert "token id 327 is not in the vocabulary" in refused(lm.embed, [[327]])


# Without a tokenizer.


def test_ids_work_without_a_tokenizer(bare):
    prompt = [5, 6, 7]
    sample = bare.sample([prompt], NEW, sampling=SamplingOptions(0.0))[0]
    assert sample.prompt == prompt
    assert sample.text is None
    assert len(sample.ids) == NEW
    assert sample.finish_reason == "length"  # no end of text either
    score = bare.score([prompt])[0]
    assert len(score.logprobs) == 2
    assert score.num_bytes == 0
    assert math.isnan(score.bits_per_byte)
    assert bare.embed([prompt])[0].shape == (3, 32)


def test_arguments_of_another_kind_are_named(models):
    lm = models["bytes"]
    for call, message in (
        (lambda: lm.generate("x", max_new_tokens="5"), "max_new_tokens must be a whole number"),
        (lambda: lm.generate("x", temperature="hot"), "temperature must be a number, not 'hot'."),
        (lambda: lm.generate("x", top_k=1.5), "top_k must be a whole number, not 1.5."),
        (lambda: lm.generate("x", seed=True), "seed must be a whole number, not True."),
        (lambda: lm.generate(5), "this takes several, not 5: give a list of prompts"),
        (lambda: lm.generate({"a": 1}), "this takes several, not {'a': 1}: give"),
        (
            lambda: lm.generate(["a", 3], 4),
            "3 is not a prompt; give a text or a list of token ids.",
        ),
        (lambda: lm.generate([b"a"]), "b'a' is not a prompt"),
        (lambda: lm.generate([[1.5]]), "a token id must be a whole number, not 1.5."),
        (lambda: lm.generate([np.ones((2, 2))]), "a token id must be a whole number, not array("),
        (lambda: next(lm.stream(["a"])), "a token id must be a whole number, not 'a'."),
        (lambda: lm.score(5), "this takes several, not 5: give a list"),
        (lambda: lm.embed({"a": 1}), "this takes several, not {'a': 1}: give a list"),
        (lambda: lm.score(["text"], "a"), "stride must be a whole number, not 'a'."),
        (lambda: lm.embed(["a"], layer=99), "layer 99 is not one of 0 to 2, or -1."),
        (lambda: lm.embed(["a"], layer="x"), "layer must be a whole number, not 'x'."),
        (lambda: lm.attention("a", layer=None), "layer must be a whole number, not None."),
    ):
        assert message in refused(call)


def test_text_without_a_tokenizer_says_what_is_missing(bare):
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.generate([[1, 2]]),
        lambda: next(bare.stream("text")),
        lambda: next(bare.stream([1, 2])),
        lambda: bare.sample(["text"]),
        lambda: bare.score(["text"]),
        lambda: bare.embed(["text"]),
    ):
        message = refused(call)
        assert f"{bare.folder} holds no tokenizer; give prompts as token ids" in message


# How a model is held.


def test_a_mesh_gives_the_same_model_in_parts(checkpoints, models):
    whole = models["bytes"]
    split = neo_jax.load(checkpoints["bytes"], mesh="fsdp=4,model=2")
    kernel = split.params["h_0"]["mlp"]["c_fc"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(64, 8)}
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), split.params, whole.params)
    )
    for prompts in (PROMPTS[:1], PROMPTS):
        assert split.generate(prompts, NEW, seed=3) == whole.generate(prompts, NEW, seed=3)
        for a, b in zip(split.score(prompts), whole.score(prompts), strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
        for a, b in zip(split.embed(prompts), whole.embed(prompts), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert list(split.stream(PROMPTS[0], NEW)) == list(whole.stream(PROMPTS[0], NEW))


def test_rules_choose_what_a_mesh_splits(checkpoints):
    split = neo_jax.load(checkpoints["bytes"], mesh="model=8", rules="mlp:model")
    layer = split.params["h_1"]
    assert layer["mlp"]["c_fc"]["kernel"].addressable_shards[0].data.shape == (16, 32)
    assert layer["attn"]["q_proj"]["kernel"].is_fully_replicated
    message = refused(neo_jax.load, checkpoints["bytes"], mesh="model=8", rules="heads:model")
    assert "h_0/attn/q_proj/kernel: axis 'heads' of size 2 does not divide over 8" in message
    assert "unknown mesh axis 'modle'" in refused(
        neo_jax.load, checkpoints["bytes"], mesh="modle=8"
    )


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.3), ("float16", 0.04)])
def test_dtypes(checkpoints, models, dtype, most):
    half = neo_jax.load(checkpoints["bytes"], dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {dtype}
    assert half.model.dtype == dtype
    ours = half.score(PROMPTS)
    for a, b in zip(ours, models["bytes"].score(PROMPTS), strict=True):
        difference = np.abs(a.logprobs - b.logprobs).max()
        assert 0 < difference < most
    assert half.embed(PROMPTS)[0].dtype == np.float32


def test_a_dtype_that_is_none(checkpoints):
    message = refused(neo_jax.load, checkpoints["bytes"], dtype="float64")
    assert message == "dtype must be 'auto', 'float32', 'bfloat16' or 'float16', not 'float64'."


@pytest.mark.parametrize("mesh", ["", "fsdp=2,model=2"])
def test_axes_in_another_order_change_nothing(checkpoints, models, monkeypatch, mesh):
    """As on a TPU, where heads and head_dim are not read well as the last axes."""

    def turned(place, axes):
        return Format(Layout((1, 0, 2)), place) if axes == ("embed", "heads", "head_dim") else place

    monkeypatch.setattr(load, "tpu_layout", turned)
    sharding = make_sharding(mesh, devices=jax.devices()[:4]) if mesh else None
    lm = neo_jax.load(checkpoints["bytes"], sharding=sharding)
    orders = {
        "/".join(path): leaf.format.layout.major_to_minor
        for path, leaf in flatten_dict(lm.params).items()
    }
    turned = {path for path, order in orders.items() if order != tuple(range(len(order)))}
    layers = range(lm.config.num_layers)
    assert turned == {f"h_{i}/attn/out_proj/kernel" for i in layers}
    prompt = list(range(1, 40))
    expected = models["bytes"].score([prompt])[0].logprobs
    np.testing.assert_allclose(lm.score([prompt])[0].logprobs, expected, rtol=0, atol=2e-5)
    options = {"max_new_tokens": 12, "temperature": 0.0}
    assert lm.generate(["The quick"], **options) == models["bytes"].generate(
        ["The quick"], **options
    )


@pytest.mark.parametrize(("kernel", "where"), [("splash", "runs on TPUs"), ("cudnn", "NVIDIA")])
def test_a_kernel_of_another_device_is_refused(checkpoints, kernel, where):
    message = refused(neo_jax.load(checkpoints["bytes"], kernel=kernel).score, [[1, 2, 3]])
    assert where in message
    assert message.endswith("use 'blocked'.")


def test_kernels_agree(checkpoints, models):
    expected = models["bytes"].embed(PROMPTS)
    for kernel in ("dense", "blocked"):
        lm = neo_jax.load(checkpoints["bytes"], kernel=kernel)
        for a, b in zip(lm.embed(PROMPTS), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


# What a caller may get wrong.


def test_options_that_do_not_exist_suggest_one_that_does(lm):
    assert refused(lm.generate, "a", temprature=1) == (
        "unknown option 'temprature'. Did you mean 'temperature'?"
    )
    assert "Did you mean 'top_k'?" in refused(lambda: next(lm.stream("a", topk=1)))
    assert "top_p must lie in" in refused(lm.generate, "a", top_p=0)


def test_prompts_that_are_none(lm):
    for call in (lm.score, lm.embed):
        assert "the prompt is empty" in refused(call, [""])
    for call in (lm.generate, lm.sample, lm.score, lm.embed):
        assert "the prompt is empty" in refused(call, [[]])
        assert "3 is not a prompt; give a text or a list of token ids" in refused(call, [3])
    assert "give a list of prompts" in refused(lm.sample, "one text")


def test_an_empty_text_begins_one(one):
    behind = one.generate([[one.tokenizer.eos_id]], 8, seed=1)
    assert one.generate("", 8, seed=1) == behind[0]
    assert "".join(one.stream("", 8, seed=1)) == behind[0]


def test_more_than_the_context_holds(lm):
    assert "4 new ones exceed the context of 64" in refused(lm.generate, [[1] * 61], 4)
    assert len(lm.sample([[1] * 61], 3)[0].ids) <= 3


def test_names_of_the_package():
    assert set(neo_jax.__all__) == {
        "LanguageModel", "ModelConfig", "Neo", "NeoError", "Sharding", "__version__", "load",
        "make_sharding",
    }  # fmt: skip
    assert all(getattr(neo_jax, name) for name in neo_jax.__all__)
    assert dir(neo_jax) == sorted(neo_jax.__all__)  # what tab completion shows
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        neo_jax.laod  # noqa: B018


def test_options_are_seen_from_outside():
    """By tab completion, `help` and the documentation, though each is declared elsewhere."""
    shown = {
        function: list(inspect.signature(function).parameters)
        for function in (neo_jax.load, neo_jax.LanguageModel.generate, neo_jax.LanguageModel.stream)
    }
    assert {"mesh", "rules", "dtype", "quantize"} < set(shown[neo_jax.load])
    assert {"temperature", "num_beams", "stop"} < set(shown[neo_jax.LanguageModel.generate])
    assert "top_p" in shown[neo_jax.LanguageModel.stream]
    assert all(names.count("model") <= 1 and "options" not in names for names in shown.values())
    with pytest.raises(NeoError, match=r"unknown option 'mesg'\. Did you mean 'mesh'\?"):
        neo_jax.load(mesg="fsdp=2")


def test_one_text_has_one_result_and_many_those_of_each(one, text):
    alone, (first,) = one.score(text), one.score([text])
    assert (alone.ids, alone.loss) == (first.ids, first.loss)
    np.testing.assert_array_equal(alone.logprobs, first.logprobs)
    texts = ["The quick brown fox", "a", text[:40], "Call me Ishmael", "the dog"]
    for layer in (0, 1, -1):
        together = one.embed(texts, layer)
        for each, states in zip(texts, together, strict=True):
            assert states.shape == (len(one.encode(each)), one.config.embed_dim)
            np.testing.assert_allclose(one.embed(each, layer), states, rtol=1e-4, atol=1e-4)


def test_features_of_many_texts_take_few_passes(one, monkeypatch):
    passes = []
    forward = inspection._hidden_states
    monkeypatch.setattr(
        inspection, "_hidden_states", lambda *args: passes.append(args[3].shape) or forward(*args)
    )
    one.embed(["the dog"] * 20)
    assert passes == [(32, 16)]


def test_several_samples_of_a_text_are_a_list(one):
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    several = one.generate("Call me", num_samples=3, **options)
    assert several == [s.text for s in one.sample(["Call me"], 5, 3, SamplingOptions(1.0, seed=3))]
    assert len(set(several)) > 1
    assert one.generate(["Call me", "the fox"], num_samples=3, **options)[0] == several
    assert one.generate("Call me", num_samples=1, **options) == several[:1]
    assert one.generate("Call me", **options) == several[0]


def test_without_a_seed_each_call_draws_one(one):
    assert len({SamplingOptions(seed=None).seed for _ in range(5)}) > 1
    options = {"max_new_tokens": 24, "temperature": 2.0, "top_p": 1.0}
    texts = {one.generate("Call me", seed=None, **options) for _ in range(4)}
    assert len(texts) > 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("do_sample", "temperature is 0"),
        ("max_length", "max_new_tokens"),
        ("max_tokens", "max_new_tokens"),
        ("num_return_sequences", "num_samples"),
    ],
)
def test_options_of_other_libraries_say_what_is_here(one, option, words):
    message = refused(lambda: one.generate("Call me", **{option: 1}))
    assert message.startswith(f"unknown option '{option}': ")
    assert words in message


def test_a_dtype_may_be_jax_s_own(checkpoints):
    lm = neo_jax.load(checkpoints["bytes"], dtype=jnp.bfloat16, cache_dtype=np.float32)
    assert lm.model.dtype == lm.params["wte"]["embedding"].dtype == jnp.bfloat16
    assert lm.model.cache_dtype == np.float32
    message = refused(lambda: neo_jax.load(checkpoints["bytes"], dtype=jnp.int32))
    assert "dtype must be 'auto'" in message


def test_a_model_is_shown_in_a_line(one, checkpoints):
    assert repr(one) == (
        f"LanguageModel(gpt_neo, {one.config.num_params:,} parameters, float32, "
        f"'{checkpoints['bytes']}')"
    )
    whole = neo_jax.load(checkpoints["bytes"], mesh="data=2,model=2", quantize="int8")
    assert "int8, mesh data=2,model=2, " in repr(whole)
    model = Neo(dataclasses.replace(preset("gpt2-medium"), vocab_size=9), jnp.dtype("bfloat16"))
    shown = repr(neo_jax.LanguageModel(model, {}, None, "x"))
    assert shown.startswith("LanguageModel(gpt2-medium, ")
    assert shown.endswith(" parameters, bfloat16, 'x')")


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_what_is_saved_is_loaded_again(checkpoints, tmp_path, quantize):
    lm = neo_jax.load(checkpoints["bytes"], quantize=quantize)
    lm.save_pretrained(tmp_path / "copy")
    copy = neo_jax.load(tmp_path / "copy")
    jax.tree.map(np.testing.assert_array_equal, copy.params, lm.params)
    assert copy.generate("Call me", 5) == lm.generate("Call me", 5)
