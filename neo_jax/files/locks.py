"""One writer an output: while a process writes a file or a folder, no other one does.

The lock is the system's, on a file in the output folder or next to the output file. It ends with
its process, whatever ends that, and readers do not see it. File systems without locks give none;
for outputs on gs://, which has none either, it excludes the other processes of this machine.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import cache_folder, check_writable, is_remote

LOCK = ".lock"  # a file in a folder that is being written


@contextlib.contextmanager
def locked(output: Path, inside: bool = False) -> Iterator[None]:
    """Holds an output as long as the context is open.

    Args:
      output: a local path, or one on gs://.
      inside: it is a folder, which is made where it does not exist (and removed if it stays
        empty), and its lock is in it; otherwise the lock is next to it, as .NAME.lock.

    Raises:
      NeoError: another process holds it, or it cannot be written.
    """
    made = inside and not is_remote(output) and not output.exists()
    place = _place(output, inside)
    try:
        file = _open(place)
    except BlockingIOError as error:
        raise NeoError(
            f"another process is writing {output}; wait for it, stop it, or choose another output."
        ) from error
    except OSError as error:
        raise NeoError(
            f"cannot write {output}: {reason(error)}; choose another output, or ask for write "
            "access."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the output may be gone, or have been moved
            place.unlink()
            if made:
                place.parent.rmdir()  # if nothing came into it
        os.close(file)


def _place(output: Path, inside: bool) -> Path:
    if is_remote(output):
        folder = cache_folder() / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / hashlib.sha256(str(output).encode()).hexdigest()[:16]
    real = Path(os.path.realpath(output))
    if inside:
        check_writable(real)
        return real / LOCK
    return real.with_name(f".{real.name}.lock")


def _open(place: Path) -> int:
    """Opens and locks a file; returns its descriptor.

    Raises:
      BlockingIOError: another process holds it.
    """
    while True:
        file = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:
            return file  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(place)):
                return file
        os.close(file)  # whoever held it has removed it: it is another file now
