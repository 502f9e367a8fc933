"""Long texts in pieces that are tokenized one by one, to the ids of the undivided text.

A cut is exact where nothing on one side of it decides what becomes of the other. Byte-level BPE has
such places everywhere: GPT-2's regular expression first divides a text into words, each of which
is white space alone, or letters, numbers or other signs, with or without a space before them. So a
word ends before white space, and where a letter is followed by anything but a letter; and none
looks back. Of other tokenizers (SentencePiece weighs up the whole text) no such place is known.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator

from neo_jax.text.tokenizer import BytePairTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Cuts:
    """Where texts may be cut."""

    pattern: re.Pattern[str]  # matches nothing, "", at places where they may
    tokens: tuple[str, ...] = ()  # no place is at one of them or within
    normalize: Callable[[str], str] = str  # what is done to a text before tokens are looked for

    def last(self, text: str, start: int) -> int:
        """Returns the last place from `start` on, whatever follows the text; 0 for none."""
        end = len(text) - self.reach
        for begin in (max(start, end - _NEAR), start):
            for found in reversed([*self.pattern.finditer(text, begin, max(begin, end + 1))]):
                if not self._touches(text, found.start()):
                    return found.start()
        return 0

    @functools.cached_property
    def reach(self) -> int:
        """How many characters on either side of a place decide whether it is one."""
        longest = max(map(len, self.tokens), default=1)
        return longest if self.normalize is str else 4 * longest + 4  # NFC makes one of four

    def _touches(self, text: str, place: int) -> bool:
        """Returns whether a token begins, ends or goes on at a place."""
        sides = text[max(0, place - self.reach) : place], text[place : place + self.reach]
        for left, right in (sides, [self.normalize(side) for side in sides]):
            for token in self.tokens:
                begin, end = len(left) - len(token), len(left) + len(token)
                if (left + right).find(token, max(0, begin), end) >= 0:
                    return True
        return False


_NEAR = 256  # characters from the end in which a place is looked for first

LINES = Cuts(re.compile(r"(?<=\S\n)(?=\S)"))
"""Where lines begin: exact for what learns a tokenizer, of either kind."""


def exact_cuts(tokenizer: Tokenizer) -> Cuts | None:
    """Returns where texts may be cut to the same ids; None where no place is known to be exact."""
    if not isinstance(tokenizer, BytePairTokenizer):
        return None
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel

    pipeline = tokenizer.pipeline
    words, normalizer = pipeline.pre_tokenizer, pipeline.normalizer
    if not (isinstance(words, ByteLevel) and words.use_regex):
        return None
    if not (normalizer is None or isinstance(normalizer, NFC)):
        return None
    normalize = normalizer.normalize_str if normalizer else str
    found = [token.content for token in pipeline.get_added_tokens_decoder().values()]
    tokens = tuple({form for token in found for form in (token, normalize(token))})
    return Cuts(_SPACES if words.add_prefix_space else _WORDS, tokens, normalize)


# A space is put before pieces that do not begin with one.
_SPACES = re.compile(r"(?<=\S)(?= )")
# Of signs outside ASCII those that are older than any library's table of letters.
_WORDS = re.compile(r"(?<=\S)(?=[ \n])|(?<=[a-zA-Zぁ-ゔァ-ヴ一-龥])(?=[!-@\[-`{-~、。「」！，？])")


def divide(parts: Iterable[str], cuts: Cuts) -> Iterator[str]:
    """Yields a text in pieces that end where it may be cut.

    A piece is about as long as a part of the text, but where there is no place to cut.
    """
    text, seen = "", 1
    for part in parts:
        if place := cuts.last(text, seen):
            yield text[:place]
            text = text[place:]
        seen = max(1, len(text) - cuts.reach)
        text += part
    if text:
        yield text
