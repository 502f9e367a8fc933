"""Words that texts must not hold: a list, and where one begins in a text that is still growing.

Case does not matter, nor how a character is composed, nor what does not show between letters. A
word is found as a whole word: "cat" not in "concatenate". Scripts that put no spaces between words
have no whole words; there it is found anywhere.
"""

import dataclasses
import functools
import json
import os
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from neo_jax.errors import NeoError, brief, reason, warn
from neo_jax.files.paths import make_path
from neo_jax.text.tokenizer import Tokenizer

_AROUND = 80  # characters of a text around a word that are shown to who reviews it
_LEAD = 400  # characters of a prompt in which a word may begin

# Scripts without spaces between words: Thai, Lao, Myanmar, Khmer, kana, Han.
_UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF),
             (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF),
             (0xFF66, 0xFF9D), (0x20000, 0x3FFFF))  # fmt: skip


class _Unit(NamedTuple):
    """A character without its case, with the marks upon it."""

    base: str
    marks: str
    start: int  # its place in the text
    end: int

    @property
    def key(self) -> str:
        """What two of them are compared by."""
        return unicodedata.normalize("NFKC", self.base + self.marks)


class Found(NamedTuple):
    """A word of the list in a text."""

    word: str  # as the list has it
    start: int
    end: int


class Scan(NamedTuple):
    """What a text holds of the list, as far as it is known."""

    found: Found | None
    settled: int  # what comes before this character holds none, whatever follows


@dataclasses.dataclass
class _Node:
    """A place in the tree of all words, unit by unit."""

    next: dict[str, "_Node"] = dataclasses.field(default_factory=dict)
    bases: frozenset[str] = frozenset()  # the bases of what may follow
    word: str = ""  # that ends here


class WordFilter:
    """A list of words and phrases, and a file for those that were found."""

    def __init__(self, words: Iterable[str], review: str = "") -> None:
        """Takes words, and the path of a file to which `report` adds lines; "" for none.

        Raises:
          NeoError: a word has no character that shows, or the file cannot be written.
        """
        self.words = tuple(words)
        self.count = 0  # texts of which something was withheld
        self._tokens: dict[int, bool] = {}
        self._root, self._lock = _Node(), threading.Lock()
        self._review = os.path.expanduser(review)
        for word in self.words:
            node = self._root
            units = list(_units(" ".join(word.split())))
            if not units:
                raise NeoError(f"the filter has the word {brief(word)}, which shows nothing.")
            for unit in units:
                node.bases |= {unit.base}
                node = node.next.setdefault(unit.key, _Node())
            node.word = word
        if review:
            self._write("")

    def holds(self, text: str) -> bool:
        """Returns whether a text has one of the words."""
        return self.scan(text, is_whole=True).found is not None

    def holds_token(self, tokenizer: Tokenizer, token: int) -> bool:
        """Returns whether a token has one of the words by itself; an unknown id has none."""
        if token not in self._tokens:
            try:
                text = tokenizer.token_bytes(token).decode(errors="replace")
            except NeoError:  # a model's vocabulary may be padded
                text = ""
            self._tokens[token] = self.holds(text)
        return self._tokens[token]

    def scan(self, text: str, start: int = 0, edge: int = 0, is_whole: bool = False) -> Scan:
        """Looks for the first of the words in a text.

        Args:
          text: of which more may follow.
          start: where to begin; no word begins before.
          edge: the characters of a prompt, in which no word ends. What follows is read as a text of
            its own too: a word may begin there in the middle of the prompt's last one.
          is_whole: nothing follows.
        """
        open_: list[tuple[int, _Node]] = []  # where words may have begun, and how far they are
        ended: list[Found] = []  # words that end where the text does now
        last = _unit_before(text, start)
        settled = start
        units = list(_units(text, start, edge))
        for i, unit in enumerate(units):
            joins = _joins(last, unit) and not (last and last.start < edge <= unit.start)
            found = [each for each in ended if not joins]
            if found:
                return self._first(found, text)
            begun = [] if joins else [(unit.start, self._root)]
            if not is_whole and i == len(units) - 1:  # marks may follow, and make it another
                settled = min(
                    [at for at, node in (*open_, *begun) if unit.base in node.bases],
                    default=unit.end,
                )
            moved = [(at, node.next.get(unit.key)) for at, node in (*open_, *begun)]
            open_ = [(at, node) for at, node in moved if node and node.next]
            ended = [
                Found(node.word, at, unit.end)
                for at, node in moved
                if node and node.word and unit.end > edge
            ]
            last = unit
        if is_whole:
            return self._first(ended, text) if ended else Scan(None, len(text))
        waiting = [at for at, _ in open_] + [each.start for each in ended]
        # What does not show behind the last unit may be followed by its marks too.
        end = len(text) if not units or settled == units[-1].end else settled
        return Scan(None, min([end, *waiting]))

    def _first(self, found: Sequence[Found], text: str) -> Scan:
        first = min(found, key=lambda each: (each.start, -each.end))
        return Scan(first, first.start)

    def report(self, prompt: str, text: str, found: Found) -> None:
        """Adds to the review file what was withheld: a line of JSON; what fails is a warning."""
        with self._lock:
            self.count += 1
        start = max(found.start - _AROUND, 0)
        line = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "word": found.word,
            "match": text[found.start : found.end],
            "context": text[start : found.end + _AROUND],
            "prompt": prompt[-_AROUND:],
        }
        if self._review:
            try:
                self._write(json.dumps(line, ensure_ascii=False) + "\n")
            except NeoError as error:  # texts go on, without the word
                warn(str(error))

    def _write(self, line: str) -> None:
        data = line.encode("utf-8", "backslashreplace")
        try:
            with self._lock:
                # For its owner alone: it holds what people wrote.
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                file = os.open(self._review, flags, 0o600)
                try:
                    os.write(file, data)
                finally:
                    os.close(file)
        except (OSError, ValueError) as error:
            raise NeoError(f"cannot write {self._review}: {reason(error)}.") from error


class FilteredText:
    """Looks for words in the text after a prompt as it grows."""

    def __init__(self, words: WordFilter, prompt: str) -> None:
        """Begins after a prompt, in which a word may begin that the text ends."""
        self.found: Found | None = None  # in the text; its start is at least 0
        self.settled = 0  # characters of the text that hold no word, whatever follows
        self._words, self._prompt = words, prompt
        self._lead = prompt[-_LEAD:]
        self._next = 0

    def look(self, text: str, is_whole: bool = False) -> bool:
        """Takes the whole text so far; returns whether it holds one of the words."""
        edge = len(self._lead)
        found, settled = self._words.scan(self._lead + text, self._next, edge, is_whole)
        self._next, self.settled = settled, max(settled - edge, 0)
        if found:
            start = max(found.start - edge, 0)
            self.found = Found(found.word, start, found.end - edge)
            self._words.report(self._prompt, self._lead + text, found)
        return found is not None


def read_word_filter(path: str, review: str = "") -> WordFilter:
    """Reads a list: a word or a phrase a line; # begins a comment.

    Args:
      path: of the list, in UTF-8.
      review: a file to which what was withheld is added.

    Raises:
      NeoError: the list cannot be read, or is empty; the review file cannot be written.
    """
    try:
        text = make_path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise NeoError(f"cannot read the filter {path}: {reason(error)}.") from error
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    words = [line for line in lines if line]
    if not words:
        raise NeoError(f"the filter {path} is empty; give a word or a phrase a line.")
    return WordFilter(words, review)


@functools.lru_cache(4096)
def _folded(char: str) -> str:
    """Returns a character without its case, taken apart, and nothing for one that does not show."""
    if _is_invisible(char):
        return ""
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", char).casefold())
    if text[:1] == " " and not char.isspace():  # a mark by itself
        return char
    return "".join(" " if each.isspace() else each for each in text)


def _is_invisible(char: str) -> bool:
    is_control = unicodedata.category(char) in ("Cf", "Cc") and not char.isspace()
    is_selector = "\ufe00" <= char <= "\ufe0f" or "\U000e0100" <= char <= "\U000e01ef"
    return is_control or is_selector or char == "\u034f"


def _is_mark(char: str) -> bool:
    return unicodedata.category(char)[0] == "M"


def _units(text: str, start: int = 0, edge: int = 0) -> Iterator[_Unit]:
    """Yields the units of a text; spaces in a row are one. None spans the edge."""
    held: _Unit | None = None
    for at in range(start, len(text)):
        for char in _folded(text[at]):
            goes_on = held is not None and not held.start < edge <= at
            if _is_mark(char):
                if held and goes_on:
                    held = held._replace(marks=held.marks + char, end=at + 1)
                continue
            if char == " " and held and goes_on and held.base == " ":
                held = held._replace(end=at + 1)
                continue
            if held:
                yield held
            held = _Unit(char, "", at, at + 1)
    if held:
        yield held


def _unit_before(text: str, start: int) -> _Unit | None:
    """Returns the unit before a place."""
    for at in range(start - 1, -1, -1):
        bases = [char for char in _folded(text[at]) if not _is_mark(char)]
        if bases:
            return _Unit(bases[-1], "", at, start)
    return None


def _joins(before: _Unit | None, unit: _Unit) -> bool:
    """Returns whether two units are within a word."""
    return before is not None and all(_is_letter(each.base) for each in (before, unit))


def _is_letter(base: str) -> bool:
    code = ord(base)
    return (base.isalnum() or base == "_") and not any(
        first <= code <= last for first, last in _UNSPACED
    )
