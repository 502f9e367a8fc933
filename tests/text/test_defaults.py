"""text/defaults.py: what generation_config.json says, as transformers follows it."""

import json

import jax
import pytest
import torch
from transformers import GPTNeoForCausalLM

import neo_jax
from neo_jax.checkpoints.save import save_pretrained
from neo_jax.config import ModelConfig
from neo_jax.decode.options import SamplingOptions
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo, init_params
from neo_jax.text.defaults import Defaults, read_defaults
from neo_jax.text.options import allowed

CONFIG = ModelConfig(
    num_layers=1,
    embed_dim=32,
    num_heads=2,
    vocab_size=64,
    max_length=48,
    attention_types=("global",),
    eos_token_id=63,
)
PROMPTS = [[40], [61, 26, 7], [25, 30, 12, 9, 30, 12, 9]]
NEW = 12


def write(folder, **fields):
    (folder / "generation_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, whose generation_config.json each test writes anew; its texts vary."""
    folder = tmp_path_factory.mktemp("defaults")
    params = jax.jit(lambda key: init_params(Neo(CONFIG), key))(jax.random.key(0))
    params = jax.tree.map(lambda leaf: 6 * leaf if leaf.ndim > 1 else leaf, params)
    save_pretrained(folder, CONFIG, params)
    return folder


def theirs(folder, **options):
    """Texts by transformers with the file as it is; the end of a text is left out."""
    torch.set_num_threads(1)
    model = GPTNeoForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, pad_token_id=0, **options)
        new = out[0, len(prompt) :].tolist()
        ends = model.generation_config.eos_token_id
        texts.append(new[:-1] if new[-1] in ends else new)
    return texts


@pytest.fixture(scope="module")
def plain(folder):
    """Greedy texts that do not end."""
    write(folder, eos_token_id=[63])
    return theirs(folder, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)


def files(plain):
    """Names and files; their ends of text occur in the texts, early and late."""
    one, two, three = plain
    ends = {"eos_token_id": [one[5], two[7], 63]}
    greedy = {**ends, "do_sample": False, "max_new_tokens": NEW}
    return {
        "ends": greedy,
        "least": {**greedy, "min_new_tokens": 9},
        "suppressed": {**greedy, "suppress_tokens": [three[0], three[3], two[2]]},
        "first": {**greedy, "begin_suppress_tokens": [one[0], two[0]]},
        "words": {
            **greedy,
            "bad_words_ids": [one[1:3], [two[1]], three[:5], [*PROMPTS[2], 5], [63]],
        },
        "forced": {**greedy, "forced_bos_token_id": 9, "begin_suppress_tokens": [one[0], two[0]]},
        "forced_end": {**greedy, "max_new_tokens": 4, "forced_eos_token_id": [63]},
        "penalty": {**greedy, "repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
        "beams": {**greedy, "num_beams": 3, "temperature": 0.3, "length_penalty": 0.5},
        "beams_and_words": {
            **{name: value for name, value in greedy.items() if name != "do_sample"},
            "num_beams": 3,
            "early_stopping": True,
            "bad_words_ids": [[one[0]], two[:2]],
            "suppress_tokens": [three[0]],
            "forced_eos_token_id": 63,
        },
    }


def test_texts_are_those_of_transformers(folder, plain):
    """Token for token, with nothing said but a prompt; and each file matters."""
    different = []
    for name, fields in files(plain).items():
        write(folder, **fields)
        lm = neo_jax.load(folder)
        ours = [sample.ids for sample in lm.samples(PROMPTS)]
        assert ours == theirs(folder), name
        different.append((name, ours))
    base = different[0][1]
    assert [name for name, ours in different[1:] if ours == base] == []
    assert any(len(text) < NEW for text in base)


DRAWN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"_from_model_config": True, "bos_token_id": 0, "transformers_version": "5.0"}, {}),
        ({"do_sample": True}, DRAWN),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 0},
            DRAWN | {"temperature": 0.6, "top_k": 0},
        ),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"temperature": 0.6, "top_p": None}, {"temperature": 0.6}),
        ({"num_beams": 4, "top_k": 9}, {"num_beams": 4, "temperature": 0.0}),
        ({"forced_eos_token_id": [7]}, {"forced_eos_token_id": 7}),
        ({"stop_strings": "\n"}, {"stop": ("\n",)}),
        ({"bad_words_ids": [[1, 2]]}, {"bad_words_ids": ((1, 2),)}),
    ],
    ids=str,
)
def test_what_a_file_says(tmp_path, tiny_config, fields, options):
    write(tmp_path, **fields)
    found, config = read_defaults(tmp_path, tiny_config)
    assert found == Defaults(options)
    assert config == tiny_config
    (tmp_path / "copy").mkdir()
    found.save(tmp_path / "copy")
    assert read_defaults(tmp_path / "copy", tiny_config)[0] == found


def test_a_file_may_be_missing(tmp_path, tiny_config):
    assert read_defaults(tmp_path, tiny_config) == (Defaults(), tiny_config)
    Defaults().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_followed_is_reported(tmp_path, tiny_config):
    neutral = {"guidance_scale": 1.0, "max_length": 20, "num_beam_groups": 1, "output_scores": True}
    strange = {"guidance_scale": 1.5, "watermarking_config": {"bias": 2.0}, "max_length": 50}
    write(tmp_path, top_k=7, suppress_tokens=[*range(90)], **neutral)
    found, _ = read_defaults(tmp_path, tiny_config)
    assert found.report({}) == (
        "generation_config.json: top_k 7, suppress_tokens (0, 1, 2, 3, 4, 5, ...)"
    )
    assert found.report(dict.fromkeys(found.options)) == ""
    write(
        tmp_path,
        do_sample=True,
        num_beams=4,
        length_penalty=2.0,
        forced_eos_token_id=[1, 2],
        **strange,
    )
    found, _ = read_defaults(tmp_path, tiny_config)
    assert found.options == DRAWN
    assert found.report(DRAWN) == (
        "generation_config.json: not followed: guidance_scale, watermarking_config, max_length, "
        "forced_eos_token_id, num_beams"
    )


@pytest.mark.parametrize(
    ("options", "said", "filled"),
    [
        ({"top_k": 5, "max_new_tokens": 9}, {}, {"top_k": 5, "max_new_tokens": 9}),
        ({"top_k": 5, "stop": ("x",)}, {"top_k": 0, "stop": ()}, {"top_k": 0, "stop": ()}),
        ({"num_beams": 4, "temperature": 0.0}, {}, {"num_beams": 4}),
        (
            {"num_beams": 4, "temperature": 0.0},
            {"num_beams": 1},
            {"num_beams": 1, "temperature": 0.0},
        ),
        ({"num_beams": 4, "temperature": 0.0}, {"temperature": 0.5}, {"temperature": 0.5}),
        ({"num_beams": 4, "length_penalty": 2.0}, {"draft": "prompt"}, {"draft": "prompt"}),
        (DRAWN, {"num_beams": 2}, {"num_beams": 2}),
        ({"length_penalty": 2.0}, {}, {}),
        ({"length_penalty": 2.0}, {"num_beams": 2}, {"length_penalty": 2.0, "num_beams": 2}),
    ],
    ids=str,
)
def test_what_a_user_says_comes_first(options, said, filled):
    assert Defaults(options).fill(said) == filled


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature must lie between 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number"),
        ({"eos_token_id": [[1]]}, "eos_token_id must be a whole number"),
        ({"num_beams": 0}, "num_beams must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"bad_words_ids": 4}, "bad_words_ids must be a list"),
    ],
)
def test_values_out_of_range_name_the_file(tmp_path, tiny_config, fields, message):
    write(tmp_path, **fields)
    with pytest.raises(NeoError, match=rf"generation_config.json: {message}"):
        read_defaults(tmp_path, tiny_config)


def test_callers_of_the_package(folder, plain):
    write(folder, **files(plain)["ends"] | {"max_new_tokens": 4, "typical_p": 0.5})
    lm = neo_jax.load(folder)
    with pytest.warns(UserWarning, match="has typical_p, which is not followed"):
        texts = [sample.ids for sample in lm.samples(PROMPTS)]
    assert texts == theirs(folder)
    greedy = SamplingOptions(temperature=0.0)
    texts = [sample.ids for sample in lm.samples(PROMPTS, 6, sampling=greedy)]
    assert texts == theirs(folder, max_new_tokens=6)
    # Options are said whole: what the file says of lengths does not hold.
    (long,) = lm.sample(PROMPTS[:1], 9, sampling=SamplingOptions(1.5, min_new_tokens=9))
    assert len(long.ids) == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suppress_tokens": [64]}, "token id 64 is not in the vocabulary, 0 to 63"),
        ({"forced_bos_token_id": 400}, "token id 400 is not in the vocabulary"),
        ({"bad_words_ids": [[5, 400]]}, "token id 400 is not in the vocabulary"),
        ({"suppress_tokens": range(64)}, "every token is suppressed"),
    ],
)
def test_ids_are_those_of_the_model(options, message):
    with pytest.raises(NeoError, match=message):
        allowed(Neo(CONFIG), SamplingOptions(**options))
