"""README.md: every command of it is one that the verb understands."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from neo_jax import cli

README = (Path(__file__).parents[1] / "README.md").read_text()


def commands():
    """The words after neo-jax of every command in code blocks and in the text."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines() if language != "python" else ():
            for command in re.findall(r"(?:^|[ /])neo-jax (.*?)(?:&&|$)", line):
                # A command may end where the quotes around it do.
                end = '"' if command.count('"') % 2 else ""
                yield shlex.split(command.removesuffix(end), comments=True)
    for command in re.findall(r"`neo-jax\s(\w+\s[^`]+)`", README):
        if "VERB" not in command:
            yield shlex.split(command)


CONFIG = """
from neo_jax.training.config import TrainConfig

config = TrainConfig(data="", output="", steps=1, batch_size=1)
"""
COMMANDS = list(commands())


class Understood(BaseException):
    """Ends a verb before it does what it was asked."""


@pytest.fixture
def understand(monkeypatch, tmp_path):
    """Runs a command line as far as its options are read."""
    (tmp_path / "my_config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    parse = tyro.cli

    def read(*args, **options):
        parse(*args, **options)
        raise Understood

    monkeypatch.setattr(tyro, "cli", read)

    def call(words):
        try:
            return cli.main(words)
        except Understood:
            return None

    return call


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_command_is_understood(understand, words, capsys):
    assert understand(words) is None, capsys.readouterr().err


def test_all_verbs_are_shown_and_what_is_unknown_is_found(understand):
    assert {words[0] for words in COMMANDS} == set(cli.VERBS)
    assert understand(["generate", "Hello", "--temprature", "1"]) == 2
    assert understand(["train", "my_config.py", "--step", "1"]) == 2
