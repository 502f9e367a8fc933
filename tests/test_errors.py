"""errors.py: messages, whatever the names in them."""

import pytest

from neo_jax.cli import explain
from neo_jax.errors import NeoError, brief, checked, printable


def test_every_character_shows():
    shown = [chr(i) for i in range(0x110000) if chr(i).isprintable()]
    assert printable("".join(shown)) == "".join(shown)
    assert printable("".join(map(chr, range(0x110000)))).isprintable()


def test_what_a_terminal_would_obey_is_escaped(capsys):
    """A name in a file cleared the screen, or wrote a line that looked like ours."""
    assert explain(NeoError("no a\x1b[2J\nneo-jax: all is well\u202e\udc80\u2028 b.")) == 1
    said = r"neo-jax: no a\x1b[2J\nneo-jax: all is well\u202e\udc80\u2028 b."
    assert capsys.readouterr().err == said + "\n"


def test_of_a_long_message_both_ends_are_shown():
    message = str(NeoError("begin " + "x" * 10_000_000 + " end"))
    assert message.startswith("begin xxx")
    assert message.endswith("xxx end")
    assert len(message) < 2100


def test_values_that_python_does_not_write():
    assert brief(10**9999) == "a huge int"
    assert brief([10**9999]) == "a huge list"
    with pytest.raises(NeoError, match="alpha must be a number, not 1000"):
        checked("alpha", 10**400, float)
