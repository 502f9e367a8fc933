"""The file that samples are written to: whole, or beside its name until it is."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from neo_jax.cli.options import output_lines
from neo_jax.distributed import from_leader, is_leader
from neo_jax.errors import NeoError, reason
from neo_jax.paths import is_remote


@contextlib.contextmanager
def sample_lines(path: str, run: Any, lines_a_prompt: int) -> Iterator[tuple[IO[str], int]]:
    """Opens what to write lines of samples to; tells for how many prompts they are there already.

    Lines go to PATH.partial-NAME, where NAME is made of what is run, and the file takes its place
    at PATH when it is whole. So the same run, interrupted, goes on where it was, another leaves it
    alone, and what is at PATH is whole. Pipes, devices and gs:// are written as they are.

    Args:
      path: "" is stdout.
      run: what decides the lines, as JSON takes it.
      lines_a_prompt: samples of each.

    Raises:
      NeoError: the file cannot be written.
      KeyboardInterrupt: was raised; the message tells what is kept.
    """
    if not path or is_remote(path) or (os.path.exists(path) and not os.path.isfile(path)):
        with output_lines(path) as file:
            yield file, 0
        return
    name = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.partial-{name}")
    done = from_leader(_whole_prompts(partial, lines_a_prompt) if is_leader() else 0)
    if not is_leader():
        with output_lines(os.devnull) as file:
            yield file, done
        return
    try:
        with partial.open("a", encoding="utf-8") as file:
            yield file, done
        partial.replace(target)
    except OSError as error:
        raise NeoError(f"cannot write {partial}: {reason(error)}.") from error
    except KeyboardInterrupt:
        kept = _whole_prompts(partial, lines_a_prompt)
        raise KeyboardInterrupt(
            f"{kept} prompts are kept in {partial}; the same command goes on there"
        ) from None
    finally:
        if partial.exists() and not partial.stat().st_size:
            partial.unlink()


def _whole_prompts(partial: Path, lines_a_prompt: int) -> int:
    """Cuts a file to the lines of whole prompts; returns of how many.

    Raises:
      NeoError: the file cannot be read or cut.
    """
    if not partial.exists():
        return 0
    try:
        with partial.open("rb+") as file:
            ends, end = [0], 0
            for line in file:
                end += len(line)
                if line.endswith(b"\n"):  # else it was being written
                    ends.append(end)
            prompts = (len(ends) - 1) // lines_a_prompt
            file.truncate(ends[prompts * lines_a_prompt])
        return prompts
    except OSError as error:
        raise NeoError(f"cannot go on with {partial}: {reason(error)}; remove it.") from error
