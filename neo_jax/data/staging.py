"""A folder that takes the place of another when it is complete."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from neo_jax.data.tokenizer import TOKENIZER_FILES
from neo_jax.data.writer import DATASET_FILE, HELD_OUT, TRAIN
from neo_jax.errors import NeoError, reason
from neo_jax.paths import check_writable, find_files, is_remote

WORK = "work"  # a sub-folder for what the data set does not hold
JOURNAL, TRAINED = "journal.jsonl", "trained"  # files in it that are worth going on from


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives a local folder that takes the place of a data set at the end.

    Where it ends early it stays, for the same command to go on from, if its sub-folder `WORK` has
    a `JOURNAL` or `TRAINED` that is not empty.

    Args:
      target: absolute. The folder lies beside it, as .NAME.partial; of one on gs:// in
        ~/.cache/neo_jax/prepare, which XDG_CACHE_HOME moves.

    Raises:
      NeoError: the target is something else than a data set, cannot be written, or is being made
        by another process.
    """
    _check_replaceable(target)
    if is_remote(target):
        check_writable(target)
    folder = _folder(target)
    work = folder / WORK
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise NeoError(f"cannot write in {folder.parent}: {reason(error)}.") from error
    with lock:
        _lock(lock, target)
        try:
            yield folder
            _finish(folder, target)
        except (NeoError, OSError, KeyboardInterrupt) as error:
            raise _explained(error, target, _is_worth_keeping(work)) from error
        finally:
            if not _is_worth_keeping(work):
                shutil.rmtree(folder, ignore_errors=True)


def clear(folder: Path) -> None:
    """Removes all but `WORK` from a folder of `staging`."""
    for path in folder.iterdir():
        if path.is_dir() and path.name != WORK:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _folder(target: Path) -> Path:
    if not is_remote(target):
        return target.with_name(f".{target.name}.partial")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.blake2b(str(target).encode(), digest_size=8).hexdigest()
    return Path(home) / "neo_jax" / "prepare" / name


def _lock(file: IO[str], target: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise NeoError(f"another process is making {target}; wait for it, or stop it.") from error
    except OSError:
        pass  # a file system without locks


def _is_worth_keeping(work: Path) -> bool:
    paths = [work / name for name in (JOURNAL, TRAINED)]
    return any(path.is_file() and path.stat().st_size for path in paths)


def _explained(error: BaseException, target: Path, is_kept: bool) -> BaseException:
    """Returns an error that also says what the same command will do."""
    if isinstance(error, OSError):
        error = NeoError(f"cannot write {target}: {reason(error)}; make room, or choose another.")
    if not is_kept:
        return error
    hope = "the same command goes on from there"
    return type(error)(f"{error} ({hope})" if str(error) else hope)


def _finish(folder: Path, target: Path) -> None:
    if is_remote(target):
        _upload(folder, target)
        shutil.rmtree(folder)
        return
    replaced = target.with_name(f".{target.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(target / WORK)
    shutil.rmtree(replaced, ignore_errors=True)


def _upload(folder: Path, target: Path) -> None:
    """Replaces a data set in the cloud; without its dataset.json it is none, so that goes last."""
    old = {path.relative_to(target).as_posix() for path in find_files(target)}
    new = {path.relative_to(folder).as_posix() for path in find_files(folder)}
    new = {name for name in new if not name.startswith(f"{WORK}/")}
    (target / DATASET_FILE).unlink(missing_ok=True)
    for name in sorted(new, key=lambda name: name == DATASET_FILE):
        with (folder / name).open("rb") as source, (target / name).open("wb") as file:
            shutil.copyfileobj(source, file, _UPLOAD_BYTES)
    for name in old - new - {DATASET_FILE}:
        (target / name).unlink()


_UPLOAD_BYTES = 8 << 20


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    mend = "choose another output, or remove it first."
    if not target.is_dir():
        raise NeoError(f"{target} is a file; {mend}")
    inside = {path.name for path in target.iterdir()}
    if inside and DATASET_FILE not in inside:
        raise NeoError(f"{target} is a folder that holds no data set; {mend}")
    other = sorted(inside - {DATASET_FILE, TRAIN, HELD_OUT, WORK, *TOKENIZER_FILES})
    if other:
        raise NeoError(f"{target} holds '{other[0]}' beside a data set; {mend}")
