"""Which files a path, a folder or a glob stands for, and what of it is left out, by name."""

import errno
import glob
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from neo_jax.errors import NeoError, printable
from neo_jax.files.paths import find_files, is_remote, make_path, match

_NAMED = 10  # of what is left out


def data_files(path: str, is_known: Callable[[str], bool], known: str) -> list[Path]:
    """Returns the files of a known ending that a path names, in the order in which they are read.

    A path is that of a file; of a folder, whose files are read in sorted order, those of
    sub-folders too and hidden ones not; or a glob, in which ** stands for any sub-folders. What a
    folder or a glob holds that is no such file (a link to nothing or to a folder, a pipe, another
    ending) is counted and named on stderr; only hidden files are left out in silence.

    Raises:
      NeoError: nothing matches, or an unknown ending.
      OSError: something cannot be read.
    """
    path = os.path.expanduser(path)
    named = make_path(path)
    exists = named.exists() or os.path.islink(path)
    is_glob = glob.has_magic(path) and not exists
    if not (exists or is_glob):
        raise NeoError(f"{path} does not exist.")
    files: list[Path] = []
    left_out: dict[Path, str] = {}
    for found in _matches(path) if is_glob else [named]:
        if kind := _kind(found):
            if not is_glob:
                raise NeoError(f"{path} is {kind}; name a file, a folder or a glob.")
            left_out[found] = kind
        elif is_glob and (link := _loop(found)):
            left_out[link] = "a link to a folder that holds it"
        elif found.is_dir():
            files += _inside(found, is_known, left_out)
        elif not is_known(found.name):
            raise NeoError(f"{found}: unknown ending; known are {known}.")
        else:
            files.append(found)
    if left_out:
        print(printable(_report(path, left_out)), file=sys.stderr)
    if not files:
        subject = f"no file that '{path}' matches" if is_glob else f"{path} holds no file that"
        raise NeoError(f"{subject} ends in {known}.")
    for file in files:
        _check_access(file, os.R_OK)
    return list(dict.fromkeys(files))  # ** matches folders and what they hold


def _matches(pattern: str) -> list[Path]:
    found = match(pattern)
    if not found:
        raise NeoError(f"nothing matches '{pattern}'; is the folder right?")
    folders = os.path.dirname(pattern)
    while folders and not is_remote(pattern) and glob.has_magic(folders):
        for folder in filter(os.path.isdir, glob.glob(folders, recursive=True)):
            _check_access(Path(folder), os.R_OK | os.X_OK)  # glob passes over it in silence
        folders = os.path.dirname(folders)
    return found


def _check_access(path: Path, mode: int) -> None:
    if not is_remote(path) and not os.access(path, mode):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _inside(folder: Path, is_known: Callable[[str], bool], left_out: dict[Path, str]) -> list[Path]:
    """Returns the files in a folder and its sub-folders, and adds what is left out."""
    files = []
    for entry in sorted(_entries(folder)):
        if not is_remote(entry) and entry.is_dir():
            left_out[entry] = "a link to a folder"
        elif kind := _kind(entry):
            left_out[entry] = kind
        elif not is_known(entry.name):
            left_out[entry] = "another ending"
        else:
            files.append(entry)
    return files


def _entries(folder: Path) -> Iterator[Path]:
    """Yields files, links and all else in a folder and its sub-folders, hidden ones not."""
    if is_remote(folder):
        for file in find_files(folder):
            if not any(part.startswith(".") for part in file.relative_to(folder).parts):
                yield file
        return
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in [*names, *links]:
            if not name.startswith("."):
                yield Path(parent, name)


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> str:
    """Returns what stands there instead of a file or a folder, "" for nothing else."""
    if is_remote(path):
        return ""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if path.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return "a link to nothing"
        raise
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _KINDS.get(stat.S_IFMT(mode), "odd")


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _loop(path: Path) -> Path | None:
    """Returns the first link on a path that leads to a folder that holds it, as ** follows."""
    downwards = () if is_remote(path) else reversed([path, *path.parents])
    links = (each for each in downwards if each.is_symlink())
    return next((x for x in links if x.parent.resolve().is_relative_to(x.resolve())), None)


def _report(path: str, left_out: dict[Path, str]) -> str:
    odd_first = sorted(left_out.items(), key=lambda item: (item[1] == "another ending", item[0]))
    names = [f"{entry} ({kind})" for entry, kind in odd_first[:_NAMED]]
    more = len(left_out) - len(names)
    rest = f" and {more:,} more" if more else ""
    return f"of {path} {len(left_out):,} left out: {', '.join(names)}{rest}"
