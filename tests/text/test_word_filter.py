"""text/word_filter.py, and texts that end before a word, whatever the tokens."""

import json
import re

import hypothesis
import hypothesis.strategies as st
import pytest

import neo_jax
from neo_jax.errors import NeoError, NeoWarning
from neo_jax.text.generate import StopText
from neo_jax.text.word_filter import Found, WordFilter, read_word_filter


def held(words, text):
    """The first word in a text, as it is written there."""
    found = WordFilter(words).scan(text, is_whole=True).found
    return found and text[found.start : found.end]


@pytest.mark.parametrize(
    ("word", "text", "found"),
    [
        ("cat", "a cat.", "cat"),
        ("cat", "A CAT", "CAT"),
        ("cat", "concatenate cats, cat_, 2cat", None),
        ("cat", "cat", "cat"),
        ("cat", "-cat-", "cat"),
        ("STRASSE", "die straße!", "straße"),
        ("straße", "STRASSE", "STRASSE"),
        ("ΣΊΣΥΦΟΣ", "Σίσυφος", "Σίσυφος"),
        ("café", "un cafe\u0301 noir", "cafe\u0301"),
        ("cafe\u0301", "CAFÉ", "CAFÉ"),
        ("cafe", "un cafe\u0301 noir, café", None),
        ("file", "the ﬁle", "ﬁle"),
        ("cat", "c\u00ada\u200dt\ufe0f", "c\u00ada\u200dt\ufe0f"),
        ("cat", "ｃａｔ", "ｃａｔ"),
        ("two words", "Two \n\u00a0 WORDS", "Two \n\u00a0 WORDS"),
        ("two words", "two wordsmiths, twowords", None),
        ("c++", "in C++11", "C++"),
        ("c++", "c+", None),
        ("$$", "a$$b", "$$"),
        ("猫", "黒猫が", "猫"),
        ("แมว", "มีแมวดำ", "แมว"),
        ("кот", "Кот, котик", "Кот"),
        ("кот", "котик", None),
        ("b", "a\u0301b b", "b"),
        ("é", "é", "é"),
        ("¨", "a ¨ b", "¨"),
    ],
)
def test_what_is_a_word(word, text, found):
    whole = WordFilter([word]).scan(text, is_whole=True).found
    shown = whole and text[whole.start : whole.end]
    if found is None:
        assert shown is None
    else:
        assert shown.rstrip("\ufe0f") == found.rstrip("\ufe0f")


def test_what_may_still_become_a_word():
    words = WordFilter(["cat", "cat food", "café"])
    for text, settled in (
        ("a c", 2), ("a ca", 2), ("a cat", 2), ("a cats", 6), ("a caf", 2), ("a cafe", 2),
        ("a cafes", 7), ("dog", 3), ("", 0), ("a b", 3),
    ):  # fmt: skip
        assert words.scan(text) == (None, settled), text
    assert words.scan("a cat ") == (Found("cat", 2, 5), 2)
    assert words.scan("a cat") == (None, 2)
    assert words.scan("a cat", is_whole=True).found == ("cat", 2, 5)


class Pieces:
    """A tokenizer whose tokens are given texts."""

    eos_id = None

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[id] for id in ids)


def oracle(words, text):
    """Where words begin, by regular expressions, of texts in ASCII."""
    return [
        match.start()
        for word in words
        for match in re.finditer(
            r"(?<!\w)" + r"\s+".join(map(re.escape, word.split())) + r"(?!\w)", text, re.IGNORECASE
        )
    ]


WORDS = st.lists(st.from_regex("[ab]{1,3}( [ab]{1,2})?", fullmatch=True), min_size=1, max_size=4)
TEXTS = st.lists(st.text("abAB c.\n", min_size=1, max_size=5), max_size=12)


@hypothesis.given(WORDS, TEXTS, TEXTS, st.sampled_from([(), ("b.",), (" c", "aa")]))
def test_no_streamed_text_ever_holds_a_word(words, prompt, pieces, stops):
    """Whatever the tokens are; nor does one that a prompt begins; else nothing is withheld."""
    tokenizer, start = Pieces([*prompt, *pieces]), len(prompt)
    before = "".join(prompt)
    text = StopText(tokenizer, list(range(start)), stops, WordFilter(words))
    shown = ""

    def show(is_finished=False):
        nonlocal shown
        shown += text.new(is_finished)
        assert text.text.startswith(shown)
        assert not oracle(words, shown), (words, shown)
        crossing = [at for at in oracle(words, before + shown) if at < len(before)]
        known = [at for at in oracle(words, before) if at < len(before)]
        assert set(crossing) <= set(known) | {at for at in crossing if _ends_in(before, words, at)}
        assert text.settled_ids() <= len(pieces)
        joined = "".join(pieces[: text.settled_ids()])
        assert shown.startswith(joined)

    for id in range(start, start + len(pieces)):
        kept = text.push([id])
        show()
        if text.stopped:
            assert kept is not None
            break
    show(is_finished=True)
    assert shown == text.text
    plain = StopText(tokenizer, list(range(start)), stops)
    plain.push(list(range(start, start + len(pieces))))
    plain.flush()
    assert plain.text.startswith(text.text)
    assert text.is_filtered == (text.text != plain.text) or not plain.text
    if not oracle(words, plain.text) and not oracle(words, before + plain.text):
        assert not text.is_filtered


def _ends_in(before, words, at):
    """Whether a word at this place ends within a prompt, and a boundary follows it only later."""
    return any(
        re.match(r"\s+".join(map(re.escape, word.split())) + "$", before[at:], re.IGNORECASE)
        for word in words
    )


@hypothesis.given(st.text(), st.lists(st.text(min_size=1), max_size=6), st.integers(0, 5))
def test_any_text_in_any_pieces(word, pieces, place):
    """All of Unicode: a word that was put there is found, however the text is cut."""
    try:
        words = WordFilter([word])
    except NeoError:
        return
    pieces.insert(min(place, len(pieces)), f" {word} ")
    whole = "".join(pieces)
    for parts in (pieces, list(whole)):
        text = StopText(Pieces(parts), [], (), words)
        for id in range(len(parts)):
            text.push([id])
            assert not words.holds(text.text[: text.settled()])
            if text.stopped:
                break
        text.flush()
        assert text.is_filtered
        assert not words.holds(text.text)


def test_files(tmp_path):
    path, review = tmp_path / "words.txt", tmp_path / "review.jsonl"
    path.write_text("\ufeffcat # an animal\n\n# nothing\n two  words \r\n", encoding="utf-8")
    assert read_word_filter(str(path)).words == ("cat", "two  words")
    with pytest.raises(NeoError, match=r"cannot read the filter .*No such file"):
        read_word_filter(str(tmp_path / "nothing"))
    with pytest.raises(NeoError, match=r"cannot write .*no/such: No such file"):
        read_word_filter(str(path), str(tmp_path / "no/such"))
    for text, why in (("# a", "is empty"), ("\u200d", "shows nothing")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(NeoError, match=why):
            read_word_filter(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(NeoError, match="cannot read the filter"):
        read_word_filter(str(path))
    words = WordFilter(["cat"], str(review))
    words.report("x" * 100 + " a", "the\ncat is", Found("cat", 4, 7))
    words.report("", "cat", Found("cat", 0, 3))
    assert review.stat().st_mode & 0o777 == 0o600
    first, second = map(json.loads, review.read_text().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "word": "cat", "match": "cat", "context": "the\ncat is", "prompt": "x" * 78 + " a"
    }  # fmt: skip
    assert (second["match"], words.count) == ("cat", 2)
    review.unlink()
    review.mkdir()
    with pytest.warns(NeoWarning, match="cannot write"):
        words.report("", "cat", Found("cat", 0, 3))


def test_generate(tmp_path):
    """A word that a model writes: the text ends before it, and so do its ids."""
    lm = neo_jax.load()
    (whole,) = lm.samples(["The people of"], 40)
    word = next(each for each in whole.text.split()[2:] if len(each) > 3 and each.isalpha())
    path, review = tmp_path / "words.txt", tmp_path / "review.jsonl"
    path.write_text(word)
    options = {"filter": str(path), "filter_review": str(review)}
    (cut,) = lm.samples(["The people of"], 40, **options)
    assert cut.finish_reason == "content_filter"
    assert whole.text.startswith(cut.text)
    assert word not in cut.text
    assert word not in lm.tokenizer.decode(cut.ids)
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert len(cut.ids) == len(cut.logprobs)
    assert "".join(lm.stream("The people of", 40, **options)) == cut.text
    lines = [json.loads(line) for line in review.read_text().splitlines()]
    assert [line["match"] for line in lines] == [word, word]
    for others in ({"num_beams": 2}, {"draft": "prompt"}):
        (found,) = lm.generate(["The people of"], 40, temperature=0, **others, **options)
        assert not WordFilter([word]).holds(found)
    path.write_text("notaword")
    assert lm.generate("The people of", 40, filter=str(path)) == whole.text
    with pytest.raises(NeoError, match="filter_review has no effect without a filter"):
        lm.generate("x", filter_review="x")
