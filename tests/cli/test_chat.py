"""neo-jax chat: with the bundled model, piped in and in a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

import neo_jax
from neo_jax.serving.templates import PLAIN


@pytest.fixture
def talk(monkeypatch, run):
    """Says lines to `neo-jax chat`; returns its status, stdout and stderr."""

    def call(lines, *args):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", "--max-new-tokens", "12", "--seed", "3", *args)

    return call


def answers(lm, prompt, seed):
    found = lm.generate(prompt, 12, temperature=0.7, top_p=0.9, seed=seed, stop="\nUser:")
    return found.strip()


def test_a_conversation(talk, tmp_path):
    lm, path = neo_jax.load(), tmp_path / "talk.json"
    lines = ["Hello", "", "/retry", "And then?", f"/save {path}"]
    status, out, err = talk(lines, "--system", "Be kind.")
    assert status == 0, err
    first = answers(lm, "Be kind.\n\nUser: Hello\nAssistant:", 3)
    second = answers(lm, "Be kind.\n\nUser: Hello\nAssistant:", 4)
    third = f"Be kind.\n\nUser: Hello\nAssistant: {second}\nUser: And then?\nAssistant:"
    third = answers(lm, third, 5)
    assert [line.strip() for line in out.splitlines()] == [first, second, third]
    assert err == f"(written to {path})\n"
    saved = json.loads(path.read_text())["messages"]
    said = ["Be kind.", "Hello", second, "And then?", third]
    assert [each["content"] for each in saved] == said
    status, out, err = talk([f"/load {path}", "/undo", "/undo", "/system", "//x", "/quit", "no"])
    assert status == 0, err
    assert out.strip() == answers(lm, "User: /x\nAssistant:", 3)
    assert err.splitlines()[-2:] == ["(taken back: And then?)", "(taken back: Hello)"]


def test_old_turns_are_left_out_and_that_is_said(talk):
    status, out, err = talk(["word " * 600, "word " * 500, "Hello"])
    assert status == 0, err
    assert len(out.splitlines()) == 3
    assert err == ("(the oldest 2 messages no longer fit the context; they are left out)\n" * 2)
    status, out, err = talk(["Hello", "word " * 2000])
    assert status == 1
    assert "exceed the context of 1024; say less, or lower --max-new-tokens" in err


def test_templates(talk, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages[-1].content }} and")
    status, out, _ = talk(["The man"], "--chat-template", str(path), "--temperature", "0")
    lm = neo_jax.load()
    assert (status, out.strip()) == (0, lm.generate("The man and", 12, temperature=0).strip())
    plain = tmp_path / "plain.jinja"
    plain.write_text(PLAIN)
    assert talk(["Hi"], "--chat-template", str(plain))[1] == talk(["Hi"])[1]
    path.write_text("{{ raise_exception('not so') }}")
    status, _, err = talk(["The man"], "--chat-template", str(path))
    assert (status, err) == (1, "neo-jax: the chat template fails: not so.\n")


def test_what_cannot_be(talk, fail, checkpoints):
    for line, why in (
        ("/retri", "there is no /retri. Did you mean '/retry'?"),
        ("/retry", "nothing was asked yet."),
        ("/undo", "nothing was said yet."),
        ("/save", "/save needs a file"),
        ("/load nothing", "there is no file nothing."),
    ):
        status, out, err = talk([line])
        assert (status, out) == (1, "")
        assert why in err
    assert "leave out --server" in fail("chat", "--server", "x", "--model", "gpt2", status=2)
    assert "no effect without --server" in fail("chat", "--api-key", "x", status=2)
    assert "is no address" in fail("chat", "--server", "localhost")
    assert "is no address" in fail("chat", "--server", "http://x:y")
    assert "no tokenizer" in fail("chat", "--model", checkpoints["bare"])
    status, _, err = talk(["Hi"], "--server", "http://127.0.0.1:1")
    assert (status, err) == (
        1, "neo-jax: cannot reach http://127.0.0.1:1: Connection refused.\n"
    )  # fmt: skip


_TAKES_IT = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from neo_jax.__main__ import main
sys.exit(main())
"""


class Terminal:
    """A process that has one."""

    def __init__(self, *args):
        self.main, side = pty.openpty()
        env = {**os.environ, "TERM": "dumb", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKES_IT, *args],
            stdin=side,
            stdout=side,
            stderr=side,
            env=env,
            start_new_session=True,
        )
        os.close(side)
        self.seen = ""

    def type(self, keys):
        os.write(self.main, keys.encode())

    def until(self, text, seconds=120):
        """Reads up to a text; returns what came before."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if select.select([self.main], [], [], 0.1)[0]:
                self.seen += os.read(self.main, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def ends(self):
        status = self.process.wait(timeout=30)
        os.close(self.main)
        return status


def test_in_a_terminal():
    """Ctrl-C stops an answer, then clears a line; the last line is there again; Ctrl-D ends."""
    terminal = Terminal("chat", "--max-new-tokens", "900", "--seed", "1")
    try:
        terminal.until("Ctrl-D ends")
        terminal.until("> ")
        terminal.type("Tell me\n")
        terminal.until("Tell me")
        terminal.until(" ")
        time.sleep(0.5)
        terminal.type("\x03")
        assert terminal.until("(stopped)")
        terminal.until("> ")
        terminal.type("not this")
        time.sleep(0.3)  # Python is in the middle of reading
        terminal.type("\x03")
        terminal.until("> ")
        terminal.type("/undo\n")
        terminal.until("(taken back: Tell me)")
        terminal.until("> ")
        terminal.type("/retri\n")
        terminal.until("Did you mean '/retry'?")
        terminal.until("> ")
        terminal.type("\x1b[A\x7fy\n")  # the line before, its last letter replaced
        terminal.until("nothing was asked yet")
        terminal.until("> ")
        terminal.type("\x04")
        assert terminal.ends() == 0
    finally:
        terminal.process.kill()


def test_a_signal_to_end():
    terminal = Terminal("chat")
    try:
        terminal.until("> ")
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.ends() == 0
    finally:
        terminal.process.kill()
