"""A data set's folder, which gets its name when it is complete."""

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

DATA = "data"  # the sub-folder that becomes the data set
PARTS, TRAINED = "parts", "trained"  # a folder and a file that are worth going on from

_UPLOAD_BYTES = 8 << 20


@contextlib.contextmanager
def staging(target: Path) -> Iterator[Path]:
    """Gives a local folder to work in, whose sub-folder `DATA` becomes a data set at the end.

    Where it ends early the folder stays, for the same command to go on from, if something is in
    its sub-folder `PARTS` or its file `TRAINED`. It is next to the target, an absolute path, as
    .NAME.partial; of one on gs:// in ~/.cache/neo_jax/prepare, which XDG_CACHE_HOME moves.

    Raises:
      NeoError: the target is there, cannot be written, or is being made by another process.
    """
    _check_new(target)
    if is_remote(target):
        check_writable(target)
        name = hashlib.blake2b(str(target).encode(), digest_size=8).hexdigest()
        folder = cache_folder() / "prepare" / name
    else:
        folder = target.with_name(f".{target.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NeoError(f"cannot write in {folder.parent}: {reason(error)}.") from error
    with locked(target):
        _check_new(target)  # another process may just have made it
        try:
            for name in (DATA, PARTS):
                (folder / name).mkdir(parents=True, exist_ok=True)
            yield folder
            if is_remote(target):
                _upload(folder / DATA, target)
            else:
                (folder / DATA).rename(target)
            shutil.rmtree(folder)
        except (NeoError, OSError, KeyboardInterrupt) as error:
            raise _explained(error, target, _is_worth_keeping(folder)) from error
        finally:
            if not _is_worth_keeping(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_worth_keeping(folder: Path) -> bool:
    """Returns whether there is something to go on from."""
    trained = folder / TRAINED
    return any(folder.glob(f"{PARTS}/*")) or (trained.is_file() and trained.stat().st_size > 0)


def _explained(error: BaseException, target: Path, is_kept: bool) -> BaseException:
    """Returns an error that also says what the same command will do."""
    if isinstance(error, OSError):
        error = NeoError(f"cannot write {target}: {reason(error)}; make room, or choose another.")
    if not is_kept:
        return error
    hope = "the same command goes on from there"
    return type(error)(f"{error} ({hope})" if str(error) else hope)


def _upload(folder: Path, target: Path) -> None:
    """Copies a data set to the cloud; without its dataset.json it is none, so that goes last."""
    old = {path.relative_to(target).as_posix() for path in find_files(target)}  # of a killed upload
    new = {path.relative_to(folder).as_posix() for path in find_files(folder)}
    for name in old - new:
        (target / name).unlink()
    for name in sorted(new, key=lambda name: name == DATASET_FILE):
        with (folder / name).open("rb") as source, (target / name).open("wb") as file:
            shutil.copyfileobj(source, file, _UPLOAD_BYTES)


def _check_new(target: Path) -> None:
    """Checks that nothing is lost where the data set will be.

    Raises:
      NeoError: there is a file, or a folder that holds more than an upload that was killed.
    """
    if not target.exists():
        return
    fix = "choose another output, or remove it first."
    if not target.is_dir():
        raise NeoError(f"{target} is a file; {fix}")
    inside = {path.name for path in target.iterdir()}
    if DATASET_FILE in inside:
        raise NeoError(f"{target} holds a data set already; {fix}")
    other = sorted(inside - {TRAIN, HELD_OUT, *TOKENIZER_FILES} if is_remote(target) else inside)
    if other:
        raise NeoError(f"{target} holds '{other[0]}' already; {fix}")
