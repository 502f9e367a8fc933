"""Paths that a user names: local ones, and gs:// by way of etils, fsspec and gcsfs.

A local path is a `pathlib.Path`; one in the cloud is an `etils.epath.Path`, which has the methods
that this package calls. The libraries are imported when the first path in the cloud is named.
"""

import glob
import importlib.util
import io
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from neo_jax.errors import NeoError, reason

_SCHEME = re.compile(r"\w[\w+.-]+:/")  # one slash: what pathlib makes of two
_BLOCK_BYTES = 1 << 20


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is in the cloud."""
    return os.fspath(path).startswith("gs://")


def make_path(path: str | os.PathLike[str]) -> Path:
    """Returns a path with the methods of `pathlib.Path`; text that names the cloud is tried once.

    A local ~ is the home folder, as a shell has it, which leaves the one of --output=~/x to us.

    Raises:
      NeoError: an unknown scheme, gcsfs is not installed, or the cloud does not let us in.
    """
    name = os.fspath(path)
    if not is_remote(name):
        if _SCHEME.match(name):
            raise NeoError(f"{name} is neither a local path nor one that begins with gs://.")
        return Path(os.path.expanduser(name))  # pathlib's raises for unknown users
    if importlib.util.find_spec("gcsfs") is None:
        raise NeoError(f"{name} needs gcsfs; install it: pip install 'neo_jax[gcs]'")
    # epath would else go through TensorFlow wherever that happens to be installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    from etils import epath

    remote = epath.Path(name)
    if isinstance(path, str):
        logger = logging.getLogger("gcsfs")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)  # what it logs with a traceback, it also raises
        try:
            _store().invalidate_cache()  # of listings; others may have written since
            remote.exists()
        except Exception as error:  # of several libraries, which share no base
            raise NeoError(
                f"cannot reach {name} ({reason(error)}); check the name, the connection and your "
                "rights (gcloud auth application-default login)."
            ) from error
    return remote


def absolute(path: Path) -> Path:
    """Returns the path from the root; one in the cloud is that already."""
    return path if is_remote(path) else path.resolve()


def is_file(path: Path) -> bool:
    """Returns whether a file has this name.

    Raises:
      NeoError: something else has it, such as a folder, a pipe or a link to nothing, which must
        not be taken for nothing; or it is no name, or may not be looked up.
    """
    if is_remote(path):
        return path.is_file()
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise NeoError(f"{path} is a link to nothing; copy the file itself.") from None
        return False
    except (OSError, ValueError) as error:  # a loop of links; a name too long, or with a NUL
        raise NeoError(f"cannot read {path}: {reason(error)}.") from error
    if not stat.S_ISREG(mode):
        raise NeoError(f"{path} is no file, but a folder, a pipe or a device; put the file there.")
    return True


def find_files(folder: Path) -> list[Path]:
    """Returns the files in a folder and its sub-folders, sorted."""
    if not is_remote(folder):
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted(_remote(_store().find(str(folder))))


def match(pattern: str) -> list[Path]:
    """Returns what a glob matches, sorted; ** stands for any sub-folders."""
    if not is_remote(pattern):
        return list(map(Path, sorted(glob.glob(os.path.expanduser(pattern), recursive=True))))
    return _remote(sorted(_store().glob(pattern)))


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading from its start to its end."""
    if not is_remote(path):
        return path.open("rb")
    return io.BufferedReader(path.open("rb"), _BLOCK_BYTES)


def read_range(path: Path, start: int, end: int) -> bytes:
    """Reads the bytes from `start` to before `end` of a file in the cloud."""
    return _store().cat_file(str(path), start=start, end=end)


def file_size(path: Path) -> int:
    """Returns the size of a file in bytes."""
    return _store().size(str(path)) if is_remote(path) else path.stat().st_size


def file_version(path: Path) -> str:
    """Returns what changes when a file does: its size and time, in the cloud all that it says."""
    if is_remote(path):
        return _store().ukey(str(path))
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def cache_folder() -> Path:
    """Returns the folder of this package for what it keeps for itself; XDG_CACHE_HOME moves it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neo_jax"


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that others see either as it was or as it is to be, whatever happens.

    Raises:
      OSError: it cannot be written, and is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    # An object is there when all of it is; a pipe or a device stays what it is.
    if is_remote(path) or (path.exists() and not path.is_file()):
        path.write_bytes(data)
        return
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(data)
    aside.replace(path)


def rmtree(folder: Path) -> None:
    """Removes a folder with all that it holds.

    Raises:
      OSError: it cannot be removed.
    """
    if is_remote(folder):
        folder.rmtree()  # type: ignore[attr-defined]  # of epath
    else:
        shutil.rmtree(folder)


def move_folder(folder: Path, to: Path) -> None:
    """Renames a folder; on gs://, which has no folders, copies its objects there, then removes it.

    Raises:
      OSError: it cannot be moved, and stays.
    """
    if not is_remote(folder):
        folder.rename(to)
        return
    paths = find_files(folder)
    _store().copy(list(map(str, paths)), [str(to / path.relative_to(folder)) for path in paths])
    rmtree(folder)


def check_writable(folder: Path) -> None:
    """Tries whether files can be written in a folder; makes it where it is local and missing.

    Raises:
      NeoError: they cannot.
    """
    probe = folder / f".neo_jax-{uuid.uuid4().hex}"
    try:
        if not is_remote(folder):  # an object store has no folders
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("May neo_jax write here?\n")
        probe.unlink()
    except Exception as error:  # of several libraries, which share no base
        raise NeoError(
            f"cannot write in {folder} ({reason(error)}); choose another output, or ask for write "
            "access."
        ) from error


def _remote(names: Iterable[str]) -> list[Path]:
    """Returns paths for names as fsspec gives them, "bucket/name"."""
    from etils import epath

    return [epath.Path(f"gs://{name}") for name in names]


def _store() -> Any:
    """Returns gcsfs's file system, the one that epath uses: they share the cache of listings."""
    from etils.epath import backend

    return backend.fsspec_backend.fs("gs://")
