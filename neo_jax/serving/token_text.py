"""How single tokens are shown: OpenAI's answers name them by their text."""

import codecs
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from neo_jax.errors import NeoError
from neo_jax.text.tokenizer import Tokenizer


class Shown(NamedTuple):
    """A token as answers show it."""

    text: str  # "bytes:\\xe2\\x82" where it is a part of a character; of a special token its name
    bytes: bytes  # what it adds to a text


class TokenTexts:
    """The texts of a tokenizer's tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Knows none yet: each is looked up once."""
        self._tokenizer = tokenizer
        self._known: dict[int, Shown] = {}

    def __getitem__(self, token: int) -> Shown:
        """Returns how a token is shown; an id that the tokenizer has not, as "token_id:50300"."""
        if token not in self._known:
            self._known[token] = self._show(token)
        return self._known[token]

    def named(self, tokens: Iterable[tuple[int, float]]) -> dict[str, float]:
        """Returns tokens and their log p by their texts; of two with one text the first has it."""
        found: dict[str, float] = {}
        for token, logprob in tokens:
            text = self[token].text
            found[f"token_id:{token}" if text in found else text] = logprob
        return found

    def _show(self, token: int) -> Shown:
        try:
            found = self._tokenizer.token_bytes(token)
            name = self._tokenizer.token_name(token)
        except NeoError:  # a model's vocabulary may be padded
            return Shown(f"token_id:{token}", b"")
        if not found:
            return Shown(name, b"")
        try:
            return Shown(found.decode(), found)
        except UnicodeDecodeError:
            return Shown("bytes:" + "".join(f"\\x{byte:02x}" for byte in found), found)


class Offsets:
    """At which characters of a text its tokens begin."""

    def __init__(self, start: int = 0) -> None:
        """Begins at a character; below 0 for characters of tokens that the text leaves out."""
        self._at = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: Shown) -> int:
        """Returns where the next token begins, or the character that it goes on with."""
        at = max(self._at, 0)
        self._at += len(self._decoder.decode(token.bytes))
        return at


def leading(tokens: Sequence[Shown], text: str) -> int:
    """Returns by how many characters tokens, joined, are longer than their text.

    SentencePiece puts a space in front.
    """
    joined = b"".join(token.bytes for token in tokens).decode(errors="replace")
    return len(joined) - len(text)
