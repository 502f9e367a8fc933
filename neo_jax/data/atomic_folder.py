"""A folder that gets its name when it is complete."""

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from neo_jax.data.writer import DATASET_FILE, HELD_OUT, TRAIN
from neo_jax.errors import NeoError, reason
from neo_jax.files.locks import locked
from neo_jax.files.paths import cache_folder, check_writable, find_files, is_remote
from neo_jax.text.tokenizer import TOKENIZER_FILES

WORK = "work"  # a sub-folder for what the data set does not hold
JOURNAL, TRAINED = "journal.jsonl", "trained"  # files in it that are worth going on from


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives a local folder that becomes a data set at the end.

    Where it ends early it stays, for the same command to go on from, if its sub-folder `WORK` has
    a `JOURNAL` or `TRAINED` that is not empty.

    Args:
      target: absolute. The folder lies beside it, as .NAME.partial; of one on gs:// in
        ~/.cache/neo_jax/prepare, which XDG_CACHE_HOME moves.

    Raises:
      NeoError: the target is there, cannot be written, or is being made by another process.
    """
    _check_new(target)
    if is_remote(target):
        check_writable(target)
    folder = _folder(target)
    work = folder / WORK
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeoError(f"cannot write in {folder.parent}: {reason(error)}.") from error
    with locked(target):
        _check_new(target)  # another process may just have made it
        try:
            work.mkdir(parents=True, exist_ok=True)
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
    name = hashlib.blake2b(str(target).encode(), digest_size=8).hexdigest()
    return cache_folder() / "prepare" / name


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
    folder.rename(target)
    shutil.rmtree(target / WORK)


def _upload(folder: Path, target: Path) -> None:
    """Copies a data set to the cloud; without its dataset.json it is none, so that goes last."""
    old = {path.relative_to(target).as_posix() for path in find_files(target)}  # of a killed upload
    new = {path.relative_to(folder).as_posix() for path in find_files(folder)}
    new = {name for name in new if not name.startswith(f"{WORK}/")}
    for name in old - new:
        (target / name).unlink()
    for name in sorted(new, key=lambda name: name == DATASET_FILE):
        with (folder / name).open("rb") as source, (target / name).open("wb") as file:
            shutil.copyfileobj(source, file, _UPLOAD_BYTES)


_UPLOAD_BYTES = 8 << 20


def _check_new(target: Path) -> None:
    """Checks that nothing is lost where the data set will be.

    Raises:
      NeoError: there is a file, or a folder that holds more than an upload that was killed.
    """
    if not target.exists():
        return
    mend = "choose another output, or remove it first."
    if not target.is_dir():
        raise NeoError(f"{target} is a file; {mend}")
    inside = {path.name for path in target.iterdir()}
    if DATASET_FILE in inside:
        raise NeoError(f"{target} holds a data set already; {mend}")
    other = sorted(inside - {TRAIN, HELD_OUT, *TOKENIZER_FILES} if is_remote(target) else inside)
    if other:
        raise NeoError(f"{target} holds '{other[0]}' already; {mend}")
