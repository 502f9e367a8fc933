"""Where words and answers are among the tokens of texts."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import neo_jax
from neo_jax.errors import NeoError
from neo_jax.text.spans import TokenEnds, best_span, join_question, join_words, windows
from neo_jax.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request, tokenizer_folders):
    return load_tokenizer(tokenizer_folders[request.param])


WORDS = st.lists(
    st.text("aefo日é'.<|endoftext|>", min_size=1, max_size=5), min_size=1, max_size=6
)  # fmt: skip


@hypothesis.given(words=WORDS)
def test_the_token_of_a_character_holds_its_first_byte(tokenizer, words):
    text, starts = join_words(words)
    assert [text[start:][: len(word)] for start, word in zip(starts, words, strict=True)] == words
    ids = tokenizer.encode(text)
    ends = TokenEnds(tokenizer)(text, ids)
    assert ends[-1] == len(text)
    assert (np.diff(ends) >= 0).all()
    for i in range(len(text)):
        token = int(np.searchsorted(ends, i, side="right"))
        # The tokens before it are those of a part of what stands before the character.
        before = tokenizer.decode(ids[:token]).rstrip("\ufffd")
        assert text[:i].startswith(before) or "<" in text
        through = tokenizer.decode(ids[: token + 1])
        assert len(through) > i or through.endswith("\ufffd") or "<" in text


def test_tokens_are_those_that_transformers_names(tokenizer_folders, text):
    """Of a word and of an answer, by its library's own offsets."""
    ours = load_tokenizer(tokenizer_folders["bytes"])
    for line in text.splitlines():
        ends = TokenEnds(ours)(line, ours.encode(line))
        theirs = ours.pipeline.encode(line)
        found = [int(np.searchsorted(ends, i, side="right")) for i in range(len(line))]
        assert found == [theirs.char_to_token(i) for i in range(len(line))]


def test_a_tokenizer_that_changes_texts_is_refused(tokenizer_folders):
    class Lower:
        def __init__(self, below):
            self.token_bytes, self.token_name = below.token_bytes, below.token_name

    below = load_tokenizer(tokenizer_folders["bytes"])
    with pytest.raises(NeoError, match="the tokenizer changes the text 'The Fox', so that its"):
        TokenEnds(Lower(below))("The Fox", below.encode("the fox"))


@pytest.mark.parametrize("longest", [1, 3, 20])
def test_the_best_span_is_the_best_of_all(longest):
    rng, empty = np.random.default_rng(longest), 0
    for _ in range(40):
        first = int(rng.integers(1, 6))
        lengths = rng.integers(first + 1, 12, rng.integers(1, 4))
        logits = [rng.normal(size=(length, 2), scale=3) for length in lengths]
        pairs, none = {}, 1.0
        for window, each in enumerate(logits):
            shares = np.exp(each)
            shares[1:first] = 0  # the rest of the question
            shares /= shares.sum(axis=0)
            none = min(none, shares[0].prod())
            pairs |= {
                (window, range(start, end + 1)): shares[start, 0] * shares[end, 1]
                for start in range(first, len(each))
                for end in range(start, min(start + longest, len(each)))
            }
        best = max(pairs, key=pairs.get)
        expected = (*best, pytest.approx(pairs[best]))
        assert best_span(logits, first, longest) == expected
        if none > pairs[best]:
            expected, empty = (0, range(0), pytest.approx(none)), empty + 1
        assert best_span(logits, first, longest, allow_none=True) == expected
    assert 0 < empty < 40


@hypothesis.given(st.integers(1, 400), st.integers(1, 2000), st.integers(1, 400))
def test_windows_hold_all_of_a_context_and_overlap(first, context, most):
    """As many as there must be, each full but for the last."""
    parts = windows(first + context, first, most)
    assert bool(parts) == (most > first)
    if not parts:
        return
    room = most - first
    assert (parts[0].start, parts[-1].stop) == (first, first + context)
    assert all(len(part) == room for part in parts[:-1])
    assert 0 < len(parts[-1]) <= room
    overlaps = [one.stop - other.start for one, other in itertools.pairwise(parts)]
    assert set(overlaps) <= {min(128, room // 2)}
    assert all(part.stop < first + context for part in parts[:-1])


def test_a_question_comes_before_its_context():
    text, start = join_question("Who?", "The fox.")
    assert text[start:] == "The fox."
    assert text[:start] == "Who?\n"


def test_what_is_no_classifier_of_words_says_so(checkpoints):
    lm = neo_jax.load(checkpoints["bytes"])
    with pytest.raises(NeoError, match="a language model, not a classifier of words; train one"):
        lm.classify_tokens(["The fox"])
    with pytest.raises(NeoError, match="a language model, not a model that finds answers"):
        lm.answer("Who?", "The fox.")
