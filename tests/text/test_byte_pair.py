"""text/byte_pair.py: the ids of transformers' AutoTokenizer, or a folder is refused."""

import contextlib
import itertools
import json

import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers, processors

from neo_jax.errors import NeoError
from neo_jax.text import byte_pair
from neo_jax.text.tokenizer import END_OF_TEXT, load_tokenizer

TEXTS = [
    "The quick brown fox",
    f" a dog {END_OF_TEXT}  the [PAD] fox<|user|> hi <|user|>the\n",
    "Thé  [MASK] dog[MASK]dogs  12345 [mask] THE <extra> x<extra>",
]


def token(content, **fields):
    plain = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {"content": content, "special": True, **plain, **fields}


NAMES = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
GPT2 = {"tokenizer_class": "GPT2Tokenizer", **NAMES}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
PAD = {"320": token("[PAD]")}

# tokenizer_config.json, special_tokens_map.json, added_tokens.json
CONFIGS = {
    "none": (None, None, None),
    "empty": ({}, None, None),
    "prefix_space": ({"add_prefix_space": True}, None, None),
    "no_prefix_space": ({"add_prefix_space": False}, None, None),
    "additional": ({"additional_special_tokens": ["<|user|>", "<|bot|>"]}, None, None),
    "extra": ({"extra_special_tokens": ["<|user|>"], "additional_special_tokens": []}, None, None),
    "extra_by_name": ({"extra_special_tokens": {"user_token": "<|user|>"}}, None, None),
    "additional_with_fields": (
        {"additional_special_tokens": [{"__type": "AddedToken", **token("[MASK]", lstrip=True)}]},
        None,
        None,
    ),
    "pad": ({"pad_token": "[PAD]", "mask_token": "[MASK]"}, None, None),
    "other_name": ({"user_token": "<|user|>"}, None, None),
    "typed": ({"mask_token": {"__type": "AddedToken", **token("[MASK]", lstrip=True)}}, None, None),
    "no_end": ({"eos_token": None}, None, None),
    "decoder": ({"pad_token": "[PAD]", "added_tokens_decoder": PAD}, None, None),
    "decoder_strips": (
        {
            "added_tokens_decoder": {
                "320": token("[MASK]", lstrip=True, rstrip=True),
                "0": token(END_OF_TEXT, lstrip=True),
                "321": token("<extra>", special=False, single_word=True, normalized=True),
            }
        },
        None,
        None,
    ),
    "decoder_hides_others": (
        {"added_tokens_decoder": PAD},
        {"mask_token": "[MASK]"},
        {"<extra>": 320},
    ),
    "map": (None, {"pad_token": "[PAD]", "eos_token": END_OF_TEXT}, None),
    "map_strips": ({}, {"mask_token": token("[MASK]", lstrip=True, normalized=True)}, None),
    "map_additional": ({}, {"additional_special_tokens": ["<|user|>"]}, None),
    "map_additional_hidden": (
        {"additional_special_tokens": []},
        {"additional_special_tokens": ["<|user|>"]},
        None,
    ),
    "map_wins": ({"pad_token": "<|user|>"}, {"pad_token": "[PAD]"}, None),
    "added": ({}, None, {"<extra>": 320, "[PAD]": 321}),
    "added_special": ({"pad_token": "[PAD]"}, None, {"[PAD]": 320, "<extra>": 321}),
    "begins": ({"add_bos_token": True}, None, None),
    "begins_and_ends": ({"add_bos_token": True, "add_eos_token": True}, None, None),
    "split": ({"split_special_tokens": True, "pad_token": "[PAD]"}, None, None),
    "word_as_special": ({"pad_token": "dog"}, None, None),
}


def template(bpe):
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )


def prefix_space(bpe):
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def strips(bpe):
    bpe.add_tokens([tokenizers.AddedToken(**token("[MASK]", lstrip=True))])


def limits(bpe):
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)


def lower(bpe):
    bpe.normalizer = normalizers.Lowercase()


def digits(bpe):
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )


FILES = [None, lambda bpe: None, template, prefix_space, strips, limits]


@pytest.fixture(scope="module")
def bpe(tokenizer_folders):
    return (tokenizer_folders["bytes"] / "tokenizer.json").read_text()


def write(folder, bpe, change, base, config, special=None, added=None, model_type="gpt_neo"):
    """Writes a folder; `change` alters tokenizer.json, None is for vocab.json and merges.txt."""
    made = tokenizers.Tokenizer.from_str(bpe)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if change is None:
        made.model.save(str(folder))
    else:
        change(made)
        made.save(str(folder / "tokenizer.json"))
    config = None if config is None else base | config
    files = {"tokenizer_config": config, "special_tokens_map": special, "added_tokens": added}
    for name, fields in files.items():
        if fields is not None:
            (folder / f"{name}.json").write_text(json.dumps(fields))
    return folder


def compare(folder):
    """Asserts that both have the same ids."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
    for text, adds in itertools.product(TEXTS, (True, False)):
        expected = theirs(text, add_special_tokens=adds)["input_ids"]
        assert ours.encode(text, adds) == expected, (text, adds)
        if not adds:
            assert ours.encode_batch([text]) == [expected]
    assert ours.vocab_size == len(theirs)
    if theirs.eos_token:
        assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("base", [GPT2, FAST], ids=["gpt2", "fast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ids_are_those_of_transformers(tmp_path, bpe, name, base):
    """For tokenizer.json as it is and with parts of its own, and for vocab.json with merges.txt."""
    for i, change in enumerate(FILES):
        if change is None and base is FAST:
            continue  # transformers does not load these
        (tmp_path / str(i)).mkdir()
        folder = write(tmp_path / str(i), bpe, change, base, *CONFIGS[name])
        if (change, base) == (strips, FAST) and name in ("decoder", "decoder_hides_others"):
            with pytest.raises(NeoError, match=r"'\[PAD\]' has the id 320 in files and 321"):
                load_tokenizer(folder)  # tokenizer.json has another token 320
        else:
            compare(folder)


@pytest.mark.parametrize(("change", "part"), [(lower, "normalizer"), (digits, "pre_tokenizer")])
def test_a_class_that_replaces_parts_of_the_file_is_refused(tmp_path, bpe, change, part):
    words = f"the {part} of tokenizer.json is not that of its class, GPT2Tokenizer; name PreT"
    with pytest.raises(NeoError, match=words):
        load_tokenizer(write(tmp_path, bpe, change, GPT2, {}))
    compare(write(tmp_path, bpe, change, FAST, {}))


def test_other_classes_are_refused(tmp_path, bpe):
    folder = write(tmp_path, bpe, FILES[1], FAST, {"tokenizer_class": "GPTNeoXTokenizerFast"})
    with pytest.raises(NeoError, match="tokenizer_class 'GPTNeoXTokenizerFast' may make other ids"):
        load_tokenizer(folder)


def test_new_tokens_are_kept_by_what_is_saved(tmp_path, bpe):
    """Where the class of the source would take them from its configuration alone."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    fields = {"added_tokens_decoder": PAD, "add_prefix_space": True}
    tokenizer = load_tokenizer(write(tmp_path / "old", bpe, template, GPT2, fields))
    tokenizer.add_tokens(["<|user|>"])
    (tmp_path / "new" / "config.json").write_text('{"model_type": "gpt_neo"}')
    tokenizer.save(tmp_path / "new")
    compare(tmp_path / "new")
    again = load_tokenizer(tmp_path / "new")
    assert again.encode(TEXTS[1], True) == tokenizer.encode(TEXTS[1], True)
    assert again.encode("<|user|>") == [321]


PANICS = {
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "pre_tokenizer": {"type": "FixedLength", "length": 0},
    "decoder": {"type": "Strip", "content": "t", "start": 1000, "stop": 1000},
}


@pytest.mark.parametrize("part", PANICS)
def test_a_panic_of_the_library_is_an_error_of_one_line(tmp_path, bpe, part):
    """When it loads, encodes or decodes."""
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(bpe) | {part: PANICS[part]}))

    def use():
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.decode(tokenizer.encode("the the"))

    with pytest.raises(NeoError, match=r"is it whole|library fails") as error:
        use()
    assert "\n" not in str(error.value)
    assert type(error.value.__cause__).__name__ == "PanicException"


def test_a_panic_while_loading_prints_nothing(tmp_path, bpe, capfd):
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("a b\n")  # and no "ab"
    with pytest.raises(NeoError, match=r"and merges\.txt \(.*\); are they whole\?$"):
        load_tokenizer(tmp_path)
    panic = json.loads(bpe) | {"normalizer": PANICS["normalizer"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(panic))
    with contextlib.suppress(NeoError):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interrupts_are_not_the_library_s(kind):
    with pytest.raises(kind), byte_pair.library("{}"):
        raise kind
