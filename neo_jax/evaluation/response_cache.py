"""Finished requests on disk, so that an evaluation that was interrupted goes on where it was.

An answer is found again by what gave it: the model, bit by bit, how and with what it computes, and
the request. So one file serves any number of models, tasks and processes, and no answer outlives
the weights that gave it. Only how requests were batched is not told apart, which sums in another
order. An answer that is not as it was written is none.

The harness's own cache (`CachingLM`) keeps none of this: its keys do not know the model, it writes
from another thread and unpickles what it finds, and it keeps no text that was drawn.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import neo_jax
from neo_jax.axes import Params
from neo_jax.checkpoints.checksums import checksums
from neo_jax.devices.probe import identity
from neo_jax.errors import NeoError
from neo_jax.model.transformer import Neo
from neo_jax.sharding.rules import device_of
from neo_jax.text.tokenizer import Tokenizer

_BUSY = 60  # seconds to wait for another evaluation that writes to the same file

# Of JAX and its compilers, what changes numbers or draws.
_SETTINGS = (
    "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable",
    "jax_enable_x64",
)  # fmt: skip
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")

Question = tuple[str | Sequence[int], ...]
"""What was requested: texts and ids."""

Form = type | tuple[type, ...]
"""What an answer is: float, str, or a list of these."""


class Answers:
    """Answers by request, in an SQLite file; `model` is what `fingerprint` returns.

    Raises:
      NeoError: the file cannot be written, or is something else.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.damaged = 0  # answers that were found and could not be used
        self._path, self._model = path, model.encode()
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_BUSY)
            # What the system has is kept when a process dies; waiting for the disk is not worth it.
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL)"
            )

    def find(self, question: Question, form: Form | None = None) -> Any:
        """Returns the answer to a question, None where there is none.

        What is there but not as `add` wrote it, or of another form, is counted in `damaged`.
        """
        key = self._key(question)
        with self._explained():
            query = "SELECT CAST(answer AS BLOB) FROM answers WHERE key = ?"
            found = self._database.execute(query, (key,)).fetchone()
        if not found:
            return None
        check, said = (found[0] or b"")[:_CHECK], (found[0] or b"")[_CHECK:]
        if check == _check(key, said):
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(said)
                if form is None or _has_form(answer, form):
                    return answer
        self.damaged += 1
        return None

    def add(self, question: Question, answer: Any) -> None:
        """Keeps an answer, anything that JSON can say; a process killed later has kept it."""
        key, said = self._key(question), json.dumps(answer).encode()
        row = (key, (_check(key, said) + said).decode())
        with self._explained(), self._database:
            self._database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _key(self, question: Question) -> bytes:
        digest = hashlib.sha256(self._model)
        for part in question:
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


_CHECK = 16  # characters before each answer, which tell whether it is as it was written


def _check(key: bytes, said: bytes) -> bytes:
    return hashlib.sha256(key + said).hexdigest()[:_CHECK].encode()


def _has_form(answer: Any, form: Form) -> bool:
    if isinstance(form, tuple):
        return isinstance(answer, list) and tuple(map(type, answer)) == form
    return type(answer) is form


def fingerprint(model: Neo, params: Params, tokenizer: Tokenizer | None = None) -> str:
    """Returns what tells a model from others: every weight, how it computes, and with what.

    That is every field of the model, and all that its tokenizer would save. On which devices a
    weight is does not matter: sums of whole numbers are the same in any order.
    """
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    for name in ("parent", "name"):  # of Flax
        del fields[name]
    fields["dtype"] = jnp.dtype(model.dtype)
    fields["cache_dtype"] = jnp.dtype(model.cache_dtype or model.dtype)
    leaves, sums = jax.tree_util.tree_leaves_with_path(params), checksums(params).values()
    parts = [
        *fields.items(),
        (neo_jax.__version__, jax.__version__, jaxlib.__version__),
        identity(device_of(model.sharding)),
        *((name, jax.config.values[name]) for name in _SETTINGS),
        *((name, os.environ.get(name)) for name in _FLAGS),
        *_saved(tokenizer),
        *(
            (jax.tree_util.keystr(path), leaf.dtype, leaf.shape, int(total))
            for (path, leaf), total in zip(leaves, sums, strict=True)
        ),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _saved(tokenizer: Tokenizer | None) -> Iterator[tuple[str, str]]:
    """Yields the name and a hash of each file that a tokenizer saves."""
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer:
            tokenizer.save(Path(folder))
        for file in sorted(Path(folder).iterdir()):
            yield file.name, hashlib.sha256(file.read_bytes()).hexdigest()
