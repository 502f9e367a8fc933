"""Finished requests on disk, so that an evaluation that was interrupted goes on where it was.

An answer is found again by what gave it: the model, bit by bit, and the request. So one file
serves any number of models and tasks, and no answer outlives the weights that gave it.
"""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neo_jax.axes import Params
from neo_jax.checksums import checksums
from neo_jax.errors import NeoError
from neo_jax.model import Neo

_BUSY = 60  # seconds to wait for another evaluation that writes to the same file

Request = tuple[str | Sequence[int], ...]
"""What was asked: texts and ids."""


class Answers:
    """Answers by request, in an SQLite file.

    Args:
      path: the file; created where there is none.
      model: what tells this model from others, as `fingerprint` returns it.

    Raises:
      NeoError: the file cannot be written, or is something else.
    """

    def __init__(self, path: Path, model: str) -> None:
        self._path = path
        self._model = model.encode()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY)
            # What the system has is kept when a process dies; waiting for the disk is not worth it.
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL)"
            )

    def find(self, request: Request) -> Any:
        """Returns the answer to a request, None where there is none."""
        with self._explained():
            found = self._database.execute(
                "SELECT answer FROM answers WHERE key = ?", (self._key(request),)
            ).fetchone()
        return json.loads(found[0]) if found else None

    def add(self, request: Request, answer: Any) -> None:
        """Keeps an answer, anything that JSON can say; a process killed later has kept it."""
        row = (self._key(request), json.dumps(answer))
        with self._explained(), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _key(self, request: Request) -> bytes:
        digest = hashlib.sha256(self._model)
        for part in request:
            data = part.encode() if isinstance(part, str) else np.asarray(part, "<i4").tobytes()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
        return digest.digest()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise NeoError(
                f"cannot keep finished requests in {self._path}: {error}; name another file with "
                "--cache, or none."
            ) from error


def fingerprint(model: Neo, params: Params) -> str:
    """Returns what tells a model from others: its shape, how it computes, and every weight.

    Where it lies does not matter: sums of whole numbers are the same in any order.
    """
    leaves, sums = jax.tree_util.tree_leaves_with_path(params), checksums(params).values()
    parts = [
        f"{model.config} {jnp.dtype(model.dtype)} {jax.default_backend()}",
        *(
            f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {total}"
            for (path, leaf), total in zip(leaves, sums, strict=True)
        ),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
