"""The file that samples are written to: whole, or next to its name until it is."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from neo_jax.devices.processes import from_leader, holding, is_leader
from neo_jax.errors import NeoError, reason
from neo_jax.files.paths import is_remote, make_path


class Kept:
    """Samples of prompts as they are done, in any order, each prompt's as a line of a file."""

    def __init__(self, file: IO[str], done: Sequence[int]):
        """Goes on with a file that holds the samples of some prompts."""
        self.done = done
        self._file = file

    def add(self, prompt: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the samples of a prompt, whatever happens next."""
        line = json.dumps([prompt, *samples], ensure_ascii=False)
        print(line, file=self._file, flush=True)


def keeps(path: str) -> bool:
    """Whether `kept_samples` can write a file; stdout, pipes, devices and gs:// it cannot."""
    path = os.path.expanduser(path)
    return bool(path) and not is_remote(path) and (os.path.isfile(path) or not os.path.exists(path))


@contextlib.contextmanager
def kept_samples(path: str, run: Any, num_prompts: int) -> Iterator[Kept]:
    """Keeps samples as they come, and at the end writes them to a file, in the order of prompts.

    They are kept in PATH.partial-NAME, where NAME is made of what is run. So the same run,
    interrupted, goes on where it was, another leaves it alone, and what is at PATH is whole.

    Args:
      path: of the file, see `keeps`.
      run: what decides the samples, as JSON takes it.
      num_prompts: of the run.

    Raises:
      NeoError: the file cannot be written, or another process is writing it.
      KeyboardInterrupt: was raised; the message says what is kept.
    """
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]
    target = make_path(path).resolve()
    partial = target.with_name(f"{target.name}.partial-{name}")
    with holding(target), _kept(partial, num_prompts, target) as kept:
        yield kept


@contextlib.contextmanager
def _kept(partial: Path, num_prompts: int, target: Path) -> Iterator[Kept]:
    """See `kept_samples`; no other process writes these files."""
    there = np.zeros(num_prompts, bool)
    if is_leader():
        there[list(_lines(partial, num_prompts))] = True
    done = np.flatnonzero(from_leader(there)).tolist()
    try:
        with (partial if is_leader() else Path(os.devnull)).open("a", encoding="utf-8") as file:
            yield Kept(file, done)
        if is_leader():
            _put_in_order(partial, num_prompts, target)
    except OSError as error:
        raise NeoError(f"cannot write {partial}: {reason(error)}.") from error
    except KeyboardInterrupt:
        # Of several processes only the first may cut the file: it may still be writing.
        kept = len(_lines(partial, num_prompts)) if is_leader() else 0
        if not kept:
            raise
        raise KeyboardInterrupt(
            f"{kept} prompts are kept in {partial}; the same command goes on there"
        ) from None
    finally:
        if is_leader() and partial.exists() and not partial.stat().st_size:
            partial.unlink()


def _lines(partial: Path, num_prompts: int) -> dict[int, tuple[int, int]]:
    """Returns where in a file the line of each prompt is; cuts off one that was being written.

    Raises:
      NeoError: the file cannot be read or cut, or holds something else.
    """
    places: dict[int, tuple[int, int]] = {}
    if not partial.exists():
        return places
    try:
        with partial.open("rb+") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n"):
                    break
                prompt = json.loads(line)[0]
                if not 0 <= prompt < num_prompts:
                    raise ValueError(f"there is no prompt {prompt}")
                places[prompt] = (end, len(line))
                end += len(line)
            file.truncate(end)
        return places
    except (OSError, ValueError, LookupError, TypeError) as error:
        words = reason(error) if isinstance(error, OSError) else str(error)
        raise NeoError(f"cannot go on with {partial}: {words}; remove it.") from error


def _put_in_order(partial: Path, num_prompts: int, target: Path) -> None:
    """Writes a line a sample, in the order of prompts; the kept ones go when that is there."""
    places = _lines(partial, num_prompts)
    ordered = partial.with_name(f"{partial.name}.ordered")
    with partial.open("rb") as file, ordered.open("w", encoding="utf-8") as new:
        for prompt in range(num_prompts):
            start, size = places[prompt]
            file.seek(start)
            for sample in json.loads(file.read(size))[1:]:
                print(json.dumps(sample, ensure_ascii=False), file=new)
    ordered.replace(target)
    partial.unlink()
