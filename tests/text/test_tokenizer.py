"""text/tokenizer.py: files, round trips, streams of text."""

import itertools
import json
import subprocess
import sys

import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from neo_jax.data.tokenizer_training import train_byte_pairs, train_sentencepiece
from neo_jax.errors import NeoError
from neo_jax.text.tokenizer import (
    END_OF_TEXT,
    BytePairTokenizer,
    StreamDecoder,
    has_tokenizer,
    load_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.\n\n" * 5,
    "Call me Ishmael. Some years ago -- never mind how long precisely --\n  naïve café\n",
    "def f(x):\n    return x + 1\n\n\nnumbers 1234567890, ünïcödé, 日本語 and 🙂",
    " ".join(map("".join, itertools.product(["mo", "ta", "ri", "ne", "su"], repeat=3))),
]

# SentencePiece writes a space as U+2581: the one character that does not survive. Surrogates are
# no text.
texts = st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([" ", "  ", "\n", "the", " the", "dog", "é", "日", "🙂", "\r", "\x00"])
).map("".join)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns folders: a tokenizer.json, the same as vocab.json and merges.txt, SentencePiece."""
    root = tmp_path_factory.mktemp("tokenizers")
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    for name in ("json", "merges"):
        (root / name).mkdir()
    bpe.save(str(root / "json" / "tokenizer.json"))
    bpe.model.save(str(root / "merges"))
    train_sentencepiece(TEXTS, 340, root / "pieces")
    return {name: root / name for name in ("json", "merges", "pieces")}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_tokenizer(folder) for name, folder in folders.items()}


@pytest.fixture(params=["json", "merges", "pieces"])
def kind(request):
    return request.param


def test_importing_is_cheap():
    code = (
        "import sys, neo_jax.text.tokenizer\n"
        "heavy = {'jax', 'flax', 'tokenizers', 'sentencepiece', 'grain', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@given(texts)
def test_text_survives_a_round_trip(loaded, text):
    for tokenizer in loaded.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.lists(texts, max_size=4))
def test_a_batch_is_its_texts(loaded, batch):
    for tokenizer in loaded.values():
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


@given(texts)
def test_the_bytes_of_tokens_are_those_of_their_text(loaded, text):
    for name, tokenizer in loaded.items():
        found = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text)))
        space = b" " if name == "pieces" and text else b""
        assert found == space + text.encode()


def test_every_token_has_a_name_and_what_it_adds_to_a_text(loaded, kind):
    tokenizer = loaded[kind]
    before = tokenizer.encode("the")
    for token in range(tokenizer.vocab_size):
        name, found = tokenizer.token_name(token), tokenizer.token_bytes(token)
        whole = tokenizer.decode([*before, token])
        assert whole == "the" + found.decode(errors="replace")
        assert name
    assert tokenizer.token_bytes(tokenizer.eos_id) == b""
    for token in (-1, tokenizer.vocab_size, 2**40):
        with pytest.raises(NeoError, match="not in the vocabulary"):
            tokenizer.token_bytes(token)


def test_the_bytes_of_added_tokens(folders, tmp_path):
    """Those that are not special are text; the library reads bytes where they can be spelled."""
    tokenizer = load_tokenizer(folders["json"])
    tokenizer.pipeline.add_tokens([" two words", "日本"])
    tokenizer.add_tokens(["<|user|>"])
    for token, found in ((400, " two words"), (401, "日本"), (402, "")):
        assert tokenizer.token_bytes(token).decode() == found == tokenizer.decode([token])
    assert tokenizer.token_name(402) == "<|user|>"
    pieces = tokenizers.Tokenizer(models.BPE({"\u2581a": 0, "<0x0A>": 1, "b": 2}, []))
    pieces.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    pieces.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert b"".join(map(tokenizer.token_bytes, [2, 0, 1])) == b"b a\n"


def test_both_byte_pair_formats_agree(loaded):
    for text in [*TEXTS, f"a{END_OF_TEXT}b"]:
        assert loaded["json"].encode(text) == loaded["merges"].encode(text)
    assert loaded["json"].vocab_size == loaded["merges"].vocab_size == 400
    assert loaded["json"].eos_id == loaded["merges"].eos_id == 0


def test_the_first_word_has_the_ids_it_has_further_on(loaded):
    pieces = loaded["pieces"]
    assert pieces.encode("the dog the dog") == 2 * pieces.encode("the dog")


def test_u2581_comes_back_as_a_space(loaded):
    pieces = loaded["pieces"]
    assert pieces.decode(pieces.encode("a\u2581b")) == "a b"


def test_special_tokens_and_padding_have_no_text(loaded, kind):
    tokenizer = loaded[kind]
    ids = tokenizer.encode("the dog")
    beyond = tokenizer.vocab_size
    assert tokenizer.decode([*ids, tokenizer.eos_id, beyond, beyond + 40]) == "the dog"


def test_only_byte_pairs_read_special_tokens_in_text(loaded):
    assert loaded["json"].encode(END_OF_TEXT) == [loaded["json"].eos_id]
    pieces = loaded["pieces"]
    assert pieces.eos_id not in pieces.encode(END_OF_TEXT)


def test_saving_and_loading(loaded, kind, tmp_path):
    tokenizer = loaded[kind]
    tokenizer.save(tmp_path / "copy")
    tokenizer = load_tokenizer(tmp_path / "copy")
    tokenizer.save(tmp_path / "copy")  # onto itself
    copy = load_tokenizer(tmp_path / "copy")
    assert (copy.vocab_size, copy.eos_id) == (loaded[kind].vocab_size, loaded[kind].eos_id)
    assert copy.encode_batch(TEXTS) == loaded[kind].encode_batch(TEXTS)


def test_transformers_loads_what_is_saved(loaded, tmp_path):
    loaded["merges"].save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == loaded["merges"].encode(text)
    assert theirs.eos_token_id == loaded["merges"].eos_id


def test_files_are_named_directly(folders, loaded, tmp_path):
    direct = load_tokenizer(folders["json"] / "tokenizer.json")
    assert direct.encode(TEXTS[1]) == loaded["json"].encode(TEXTS[1])
    other = tmp_path / "mine.model"
    other.write_bytes((folders["pieces"] / "tokenizer.model").read_bytes())
    for source in (other, tmp_path):
        assert load_tokenizer(source).encode(TEXTS[1]) == loaded["pieces"].encode(TEXTS[1])
    named = tmp_path / "mine.json"
    named.write_bytes((folders["json"] / "tokenizer.json").read_bytes())
    load_tokenizer(named).save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("dog") == loaded["json"].encode("dog")


def test_a_class_of_transformers_is_not_its_model_file(folders, tmp_path):
    (tmp_path / "spiece.model").write_bytes((folders["pieces"] / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert load_tokenizer(tmp_path).encode("a dog")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(NeoError, match="the tokenizer_class 'T5Tokenizer' makes other ids"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "spiece.model").encode("a dog")


def test_settings_of_the_file_do_not_touch_the_ids(folders, loaded, tmp_path):
    bpe = tokenizers.Tokenizer.from_file(str(folders["json"] / "tokenizer.json"))
    bpe.enable_truncation(3)
    bpe.enable_padding(length=50)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXTS[0]) == loaded["json"].encode(TEXTS[0])
    assert tokenizer.encode_batch(["a", "the dog"]) == loaded["json"].encode_batch(["a", "the dog"])


@pytest.mark.parametrize("token", ["the", {"content": "the"}])
def test_the_configuration_names_the_end_of_text(folders, tmp_path, token):
    data = (folders["json"] / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    vocab = json.loads(data)["model"]["vocab"]
    assert load_tokenizer(tmp_path).eos_id == vocab["the"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(NeoError, match="'</s>' is not in the vocabulary; correct eos_token"):
        load_tokenizer(tmp_path)


def test_added_tokens_keep_their_ids(folders, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folders["merges"] / name).read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<two>": 401, "<one>": 400}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<two><one>") == [401, 400]
    assert tokenizer.vocab_size == 402


def test_openais_names_of_the_files(folders, loaded, tmp_path):
    """As GPT-2 was released: encoder.json and vocab.bpe."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name, other in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        (theirs / other).write_bytes((folders["merges"] / name).read_bytes())
    assert has_tokenizer(theirs)
    tokenizer = load_tokenizer(theirs)
    tokenizer.save(tmp_path / "saved")
    for found in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert found.eos_id == loaded["merges"].eos_id
        assert found.encode_batch(TEXTS) == loaded["merges"].encode_batch(TEXTS)
    (theirs / "vocab.bpe").write_text("x")
    with pytest.raises(NeoError, match=r"cannot read .*/encoder\.json and vocab\.bpe \("):
        load_tokenizer(theirs)
    (theirs / "vocab.bpe").unlink()
    assert not has_tokenizer(theirs)


def test_missing_and_corrupt_files(tmp_path):
    def message(source):
        with pytest.raises(NeoError) as error:
            load_tokenizer(source)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "does not exist" in message(tmp_path / "nowhere")
    assert "put tokenizer.json there" in message(tmp_path)
    (tmp_path / "a.model").write_bytes(b"not a model")
    assert "a.model is not a SentencePiece model; is it whole?" in message(tmp_path)
    (tmp_path / "b.model").write_bytes(b"")
    assert "holds a.model, b.model; name one" in message(tmp_path)
    assert "b.model is not a SentencePiece model" in message(tmp_path / "b.model")
    data = (tmp_path / "a.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(data)
    assert "spiece.model is not a" in message(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert "tokenizer.model is not a" in message(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("a b\n")
    assert "cannot read" in message(tmp_path)
    (tmp_path / "merges.txt").write_text("")
    assert "vocabulary is empty" in message(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    assert "tokenizer.json is not valid JSON" in message(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    assert "is not a tokenizer.json" in message(tmp_path)


def test_lone_surrogates_are_refused(loaded, kind):
    for encode in (loaded[kind].encode, lambda text: loaded[kind].encode_batch(["a", text])):
        with pytest.raises(NeoError, match=r"character 2 is the lone surrogate '\\udcff'"):
            encode("ab\udcff")


def test_training_is_deterministic(tmp_path):
    one = train_sentencepiece(TEXTS, 340, tmp_path / "one.model")
    train_sentencepiece(iter(TEXTS), 340, tmp_path / "two")
    files = (tmp_path / "one.model", tmp_path / "two" / "tokenizer.model")
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (one.vocab_size, one.eos_id) == (340, 1)


def test_byte_pairs_are_trained(tmp_path):
    assert isinstance(train_byte_pairs(iter(TEXTS), 400, tmp_path / "one"), BytePairTokenizer)
    train_byte_pairs(TEXTS, 400, tmp_path / "two")
    one, two = (load_tokenizer(tmp_path / name) for name in ("one", "two"))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (
        tmp_path / "two" / "tokenizer.json"
    ).read_bytes()
    assert (one.vocab_size, one.eos_id) == (400, 0)
    odd = "\x00 ünseen\n\n  日\U0001f600"
    assert one.decode(one.encode(odd)) == odd
    two.save(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    for text in [*TEXTS, odd, f"a{END_OF_TEXT}b"]:
        assert theirs(text)["input_ids"] == one.encode(text)
    assert theirs.eos_token_id == 0


def test_training_byte_pairs_passes_errors_on(tmp_path):
    with pytest.raises(NeoError, match="lone surrogate"):
        train_byte_pairs([TEXTS[0], "ab\udcff"], 300, tmp_path)
    with pytest.raises(NeoError, match="too small for 300 tokens; ask for at most 257"):
        train_byte_pairs([], 300, tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()


def test_training_reads_lines_of_any_length(tmp_path, capfd):
    long_line = TEXTS[-1] * 50
    assert len(long_line) > 20_000
    tokenizer = train_sentencepiece([long_line, "x" * 5000, "é" * 3000], 300, tmp_path)
    assert capfd.readouterr() == ("", "")
    # The long line was not skipped: its syllables are pieces.
    assert len(tokenizer.encode("motari nesumo")) <= 6


@pytest.mark.parametrize(
    ("given_texts", "size", "message"),
    [
        ([], 300, "no text to train"),
        (["", "\n\n"], 300, "no text to train"),
        (TEXTS, 100, "100 pieces are too few for this text; ask for at least"),
        (TEXTS, 30000, "too small for 30000 pieces; ask for at most"),
        (["ab\udcff"], 300, "lone surrogate"),
    ],
)
def test_training_errors(tmp_path, given_texts, size, message):
    with pytest.raises(NeoError, match=message):
        train_sentencepiece(given_texts, size, tmp_path / "t.model")
    assert not (tmp_path / "t.model").exists()


def stream(tokenizer, prompt, ids, sizes):
    decoder = StreamDecoder(tokenizer, prompt)
    out, rest = "", list(ids)
    while rest:
        size = sizes.pop() if sizes else 1
        out += decoder.push(rest[:size])
        rest = rest[size:]
    return out + decoder.flush()


@given(texts, texts, st.lists(st.integers(0, 5), max_size=20))
def test_a_stream_of_text_is_the_text(loaded, prompt, text, sizes):
    for tokenizer in loaded.values():
        ids = tokenizer.encode(prompt)
        new = tokenizer.encode(prompt + text)[len(ids) :]
        whole = tokenizer.decode([*ids, *new])
        expected = whole.removeprefix(tokenizer.decode(ids))
        if whole.startswith(tokenizer.decode(ids)):
            assert stream(tokenizer, ids, new, list(sizes)) == expected


@given(st.lists(st.integers(0, 339), max_size=8), st.lists(st.integers(0, 339), max_size=60))
def test_a_stream_of_any_ids_is_their_text(loaded, prompt, ids):
    """Ids at random: bytes that are no UTF-8, ends of text, spaces in a row."""
    for tokenizer in loaded.values():
        before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
        got = stream(tokenizer, prompt, ids, [])
        if whole.startswith(before):
            assert got == whole[len(before) :]
        else:  # the prompt ended within a character, which the stream returns whole
            assert whole.endswith(got)
            assert before.startswith(whole[: len(whole) - len(got)])


def test_a_stream_holds_back_unfinished_characters(loaded, kind):
    tokenizer = loaded[kind]
    ids = tokenizer.encode("a 🚀 b")
    decoder = StreamDecoder(tokenizer, tokenizer.encode("a"))
    pieces = [decoder.push([i]) for i in ids[1:]]
    assert "".join(pieces) == " 🚀 b"
    assert not any("\ufffd" in piece for piece in pieces)
    cut = StreamDecoder(tokenizer)
    rocket = tokenizer.encode("🚀")
    assert "\ufffd" not in cut.push(rocket[:-1])
    assert cut.flush().endswith("\ufffd")


def test_a_stream_finishes_the_character_of_its_prompt(loaded, kind):
    ids = loaded[kind].encode("a 🚀")
    assert StreamDecoder(loaded[kind], ids[:-1]).push(ids[-1:]) == "🚀"


def test_a_stream_decodes_a_window():
    class Counting:
        vocab_size, eos_id, decoded = 128, None, 0

        def decode(self, ids):
            self.decoded += len(ids)
            return "".join(map(chr, ids))

    tokenizer = Counting()
    decoder = StreamDecoder(tokenizer, [65] * 100)
    assert "".join(decoder.push([66]) for _ in range(1000)) == "B" * 1000
    assert tokenizer.decoded < 5000
