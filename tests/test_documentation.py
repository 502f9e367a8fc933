"""README.md and docs/: every command is understood, every program runs, no path is stale."""

import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest
import tyro

import neo_jax
import neo_jax.data.prepare
import neo_jax.training.loop
from neo_jax import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


def blocks(text):
    """The language and the content of every code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The words after neo-jax of every command in code blocks and in the text."""
    for language, block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines() if language != "python" else ():
            for command in re.findall(r"(?:^|[ /])neo-jax (.*?)(?:&&|$)", line):
                # A command may end where the quotes around it do.
                end = '"' if command.count('"') % 2 else ""
                yield tuple(shlex.split(command.removesuffix(end), comments=True))
    for command in re.findall(r"`neo-jax\s(\w+\s[^`]+)`", text):
        if not {"VERB", "MODEL", "CONFIG", "..."} & set(command.split()):
            yield tuple(shlex.split(command))


CONFIG = """
from neo_jax.training.config import TrainConfig

config = TrainConfig(data="", output="", steps=1, batch_size=1)
"""
COMMANDS = sorted({words for text in TEXTS.values() for words in commands(text)})


class Understood(BaseException):
    """Ends a verb before it does what was requested."""


@pytest.mark.parametrize("page", [*TEXTS, "CHANGELOG.md", "CONTRIBUTING.md"])
def test_no_merge_left_its_marks(page):
    assert not re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", (ROOT / page).read_text(), re.MULTILINE)


@pytest.fixture
def understand(monkeypatch, tmp_path):
    """Runs a command line as far as its options are read."""
    (tmp_path / "my_config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    parse = tyro.cli

    def read(*args, **options):
        call.options = parse(*args, **options)
        raise Understood

    monkeypatch.setattr(tyro, "cli", read)

    def call(words):
        try:
            return cli.main(list(words))
        except Understood:
            return None
        except SystemExit as stop:  # --help
            return stop.code or None

    return call


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_command_is_understood(understand, words, capsys):
    assert understand(words) is None, capsys.readouterr().err


def test_no_run_of_the_pages_is_warm_up_for_the_most_part(understand):
    runs = [words for words in COMMANDS if words[0] == "train" and "--help" not in words]
    assert len(runs) > 5
    for words in runs:
        if "my_config.py" not in words:  # of one step, for this test
            understand(words)
            config = understand.options.config
            steps = config.steps or 10 * config.epochs  # of the least data
            assert 2 * config.optimizer.warmup_steps <= steps, words


def test_all_verbs_are_shown_and_what_is_unknown_is_found(understand):
    assert {words[0] for words in COMMANDS} == set(cli.VERBS)
    assert {words[0] for words in commands(TEXTS["README.md"])} == set(cli.VERBS)
    assert understand(["generate", "Hello", "--temprature", "1"]) == 2
    assert understand(["train", "my_config.py", "--step", "1"]) == 2


PROGRAMS = {
    name: "\n".join(code for language, code in blocks(text) if language == "python")
    for name, text in TEXTS.items()
}
PROGRAMS = {name: code for name, code in PROGRAMS.items() if "import neo_jax" in code}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_programs_of_a_page_run(name, monkeypatch, tmp_path, capsys):
    """With the bundled model for all others; data and training only as far as their calls."""
    load = neo_jax.load
    monkeypatch.setattr(neo_jax, "load", lambda *args, **options: load())
    for module, function in (("data.prepare", "prepare"), ("training.loop", "train")):
        place = getattr(getattr(neo_jax, module.split(".")[0]), module.split(".")[1])
        signature = inspect.signature(getattr(place, function))
        monkeypatch.setattr(place, function, signature.bind)
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[name], name, "exec"), {})


def test_most_pages_have_programs_or_commands():
    with_code = {name for name, text in TEXTS.items() if list(commands(text)) or name in PROGRAMS}
    assert len(PROGRAMS) >= 4
    assert len(with_code) >= 13


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_links_lead_somewhere(name):
    text, folder = TEXTS[name], (ROOT / name).parent
    roots = "neo_jax|tests|benchmarks|configs|convert|docs|notebooks"
    for path in re.findall(rf"`((?:{roots})/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:python |: )`?(benchmarks/\w+\.py)", text):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (folder / link).exists(), link


def test_names_of_the_api_are_where_their_module_defines_them():
    named = [pair for text in TEXTS.values() for pair in re.findall(_DIRECTIVE, text, re.MULTILINE)]
    assert len(named) > 20
    for kind, name in named:
        place = name if kind == "module" else name.rpartition(".")[0]
        module = importlib.import_module(place)
        if kind != "module":
            assert getattr(module, name.rpartition(".")[2]).__module__ == place, name


_DIRECTIVE = r"^\.\. auto(module|class|function|exception):: ([\w.]+)$"


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) < 200
