"""data/listing.py: which files are read, and that nothing is left out in silence."""

import os
import socket

import pytest

from neo_jax.cli import main
from neo_jax.data.sources import find_sources
from neo_jax.errors import NeoError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two files to read, and one of everything that is none."""
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("in/a.txt", "in/sub/b.txt", "in/.hidden.txt", "elsewhere/c.txt"):
        (tmp_path / name).write_text(name)
    (folder / "notes.md").write_text("")
    (folder / "dangling.txt").symlink_to("nowhere.txt")
    (folder / "itself.txt").symlink_to("itself.txt")
    (folder / "through.txt").symlink_to("a.txt/c.txt")
    (folder / "linked.txt").symlink_to("../elsewhere/c.txt")
    (folder / "other").symlink_to("../elsewhere")
    (folder / "sub" / "loop").symlink_to("..")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("in/socket.jsonl")
    return folder


LEFT_OUT = {
    "dangling.txt (a link to nothing)",
    "itself.txt (a link to nothing)",
    "notes.md (another ending)",
    "other (a link to a folder)",
    "pipe.txt (a pipe)",
    "socket.jsonl (a socket)",
    "sub/loop (a link to a folder)",
    "through.txt (a link to nothing)",
}


def names(inputs):
    return [source.name for source in find_sources(inputs)]


def left_out(err, path, folder):
    """What a line on stderr names, without the folder."""
    head, _, entries = err.partition(" left out: ")
    assert err.count("\n") == 1
    found = set(entries.replace(f"{folder}/", "").rstrip("\n").split(", "))
    assert head == f"of {path} {len(found)}"
    return found


def test_what_a_folder_holds_beside_files_is_named(folder, capsys):
    assert names([folder]) == [f"{folder}/{name}" for name in ("a.txt", "linked.txt", "sub/b.txt")]
    assert left_out(capsys.readouterr().err, folder, folder) == LEFT_OUT
    assert names([folder / "sub" / "b.txt"]) == [f"{folder}/sub/b.txt"]
    assert capsys.readouterr().err == ""


def test_what_a_glob_matches_beside_files_is_named(folder, capsys):
    assert names([f"{folder}/*.txt"]) == [f"{folder}/a.txt", f"{folder}/linked.txt"]
    assert left_out(capsys.readouterr().err, f"{folder}/*.txt", folder) == {
        entry for entry in LEFT_OUT if ".txt" in entry
    }


@pytest.mark.parametrize("pattern", ["**/*.txt", "**"])
def test_globs_read_each_file_once(folder, capsys, pattern):
    """Links to folders are followed, but for those that lead back to where they lie."""
    (folder / "notes.md").unlink()
    read = [f"{folder}/{name}" for name in ("a.txt", "linked.txt", "other/c.txt", "sub/b.txt")]
    assert sorted(names([f"{folder}/{pattern}"])) == read
    assert "sub/loop (a link to a folder that holds it)" in capsys.readouterr().err


def test_many_are_counted(folder, capsys):
    for i in range(20):
        (folder / f"{i:02}.pdf").write_text("")
    names([folder])
    err = capsys.readouterr().err
    assert err.startswith(f"of {folder} {20 + len(LEFT_OUT)} left out: ")
    assert err.endswith(" and 18 more\n")
    assert all(entry.partition(" ")[0] in err for entry in LEFT_OUT if ".md" not in entry)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dangling.txt", "a link to nothing"),
        ("itself.txt", "a link to nothing"),
        ("pipe.txt", "a pipe"),
        ("socket.jsonl", "a socket"),
        ("/dev/null", "a device"),
    ],
)
def test_what_is_named_has_to_be_a_file(folder, name, kind):
    with pytest.raises(NeoError, match=rf"{name} is {kind}; name a file, a folder or a glob\.$"):
        names([folder / name])


def test_what_may_not_be_read_is_refused_at_once(folder, monkeypatch):
    access, scandir = os.access, os.scandir
    closed = set()

    def scan(path="."):
        if str(path) in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) not in closed and access(path, mode)
    )
    monkeypatch.setattr(os, "scandir", scan)
    for path, inputs in (
        ("sub", [folder]),
        ("sub", [f"{folder}/*/*.txt"]),
        ("sub", [f"{folder}/**/*.txt"]),
        ("sub/b.txt", [folder]),
        ("sub/b.txt", [folder / "sub" / "b.txt"]),
    ):
        closed.clear()
        closed.add(f"{folder}/{path}")
        with pytest.raises(NeoError, match=f"^cannot read {folder}/{path}: Permission denied.$"):
            names(inputs)
    closed.clear()
    closed.add(f"{folder}/.hidden")
    (folder / ".hidden").mkdir()
    assert len(names([folder])) == 3  # hidden folders are not looked into


def test_names_are_shown_escaped(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "\x1b[2J\n\u202e.pdf").write_text("")
    names([tmp_path])
    assert "/\\x1b[2J\\n\\u202e.pdf (another ending)\n" in capsys.readouterr().err


def test_prepare_names_what_it_leaves_out(folder, tmp_path, tokenizer_folders, capsys):
    tokenizer = str(tokenizer_folders["bytes"])
    assert main(["prepare", "in", "--output", "out", "--tokenizer", tokenizer]) == 0
    assert left_out(capsys.readouterr().err, "in", "in") == LEFT_OUT
