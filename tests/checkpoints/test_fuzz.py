"""Folders that were damaged in any way: a clear error or a correct load, and never more."""

import collections
import tracemalloc
import warnings
from pathlib import Path

import pytest

from benchmarks.fuzz_folders import KINDS, MARK, make_folders, read, refusal


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("whole") / "root")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(folders, tmp_path, monkeypatch, kind):
    """Sixty of each kind; benchmarks/fuzz_folders.py makes any number."""
    monkeypatch.chdir(tmp_path)
    outcomes = collections.Counter()
    size = sum(map(len, folders[kind].values()))
    for case in range(60):
        if case % 10 == 0:
            tracemalloc.start()
        with warnings.catch_warnings(record=True, action="always") as caught:
            message = refusal(1, case, kind, folders)
        outcomes["read" if message is None else "refused"] += 1
        lines = [str(warning.message) for warning in caught] + ([message] if message else [])
        assert message != "", case
        assert all(line.strip() and line.isprintable() for line in lines), case
        if case % 10 == 0:
            # A change adds at most some megabytes to a file.
            assert tracemalloc.get_traced_memory()[1] < 100 * size + 20_000_000, case
            tracemalloc.stop()
        assert not Path(MARK).exists(), case
    assert min(outcomes.values()) > 1, outcomes
    assert outcomes["refused"] > 20, outcomes


def test_whole_folders_are_read(folders, tmp_path, monkeypatch):
    """What is damaged above is refused for its damage."""
    monkeypatch.chdir(tmp_path)
    for kind, files in folders.items():
        for name, data in files.items():
            path = tmp_path / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        read(kind, tmp_path / kind)
