"""What libraries below Python print, whatever Python's own streams are."""

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Drops what is written to the process's stderr meanwhile."""
    with tempfile.TemporaryFile() as printed:
        stderr = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
