"""Options and files that several verbs share."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Any

from neo_jax.checkpoints.options import LoadOptions
from neo_jax.data.sources import json_lines, text_lines
from neo_jax.devices.processes import holding, is_leader, say
from neo_jax.errors import NeoError, reason
from neo_jax.files import figure
from neo_jax.files.compression import unpacked_name
from neo_jax.files.paths import check_writable, is_remote, make_path

if TYPE_CHECKING:
    from neo_jax.text.language_model import LanguageModel, Prompt


@dataclasses.dataclass(frozen=True)
class ModelOptions(LoadOptions):
    """Which model, and how to hold it."""

    def load(self) -> "LanguageModel":
        """Loads the model; of a run, reports on stderr which of its folders that is."""
        from neo_jax.text.load import load

        others = {name: value for name, value in vars(self).items() if name != "model"}
        lm = load(self.model or None, **others)
        if self.model and lm.folder.parent == make_path(self.model):
            say(f"model: {lm.folder}")
        return lm


@dataclasses.dataclass(frozen=True)
class TextModelOptions(ModelOptions):
    """Which model, and how to hold it."""

    tokenizer: str = ""  # another model's, by name, or a folder or file of one; else its own


def said_in(args: Sequence[str]) -> set[str]:
    """Returns the names of the options that a command line gives, as their fields are called."""
    names = (arg[2:].split("=")[0] for arg in args if arg.startswith("--"))
    return {name.replace("-", "_") for name in names}


def read_prompts(path: str, key: str) -> list[str | list[int]]:
    """Reads texts or ids from a file.

    Args:
      path: .jsonl, with {key: text} or {"ids": [...]} a line; else a text a line; or one of
        them as .bz2, .gz, .xz or .zst.
      key: the name of the text in a JSON line.

    Raises:
      NeoError: the file cannot be read, or a line is neither; the message names the line.
    """
    if not unpacked_name(path).endswith(".jsonl"):
        prompts: list[str | list[int]] = [line for _, line in text_lines(make_path(path))]
    else:
        prompts = [_prompt(fields, key, where) for where, fields in json_lines(make_path(path))]
    if not prompts:
        raise NeoError(f"{path} is empty; give a line for each text.")
    return prompts


def _prompt(fields: dict[str, Any], key: str, where: str) -> str | list[int]:
    if isinstance(fields.get(key), str):
        return fields[key]
    ids = fields.get("ids")
    if isinstance(ids, list) and all(type(i) is int for i in ids):
        return ids
    raise NeoError(f'{where}: expected {{"{key}": "text"}} or {{"ids": [1, 2, 3]}}.')


def with_features_of(
    lm: "LanguageModel", path: str, prompts: Sequence["Prompt"]
) -> tuple["LanguageModel", list["Prompt"]]:
    """Returns a model and prompts behind what it maps the rows of a .npy file to.

    One prompt is for all rows.

    Raises:
      NeoError: see `open_features` and `with_features`.
    """
    from neo_jax.data.features import open_features
    from neo_jax.text.prefixes import with_features

    rows = open_features(path)
    prompts = [*prompts] * (len(rows) if len(prompts) == 1 else 1)
    if len(prompts) != len(rows):
        raise NeoError(f"{path} has {len(rows)} rows, for {len(prompts)} texts; give one for each.")
    lm, ids = with_features(lm, rows, prompts)
    return lm, [*ids]


def check_output(path: str, source: str = "") -> None:
    """Tries whether `output_lines` can write a file, and leaves it as it is.

    Args:
      path: of the file; "" is stdout.
      source: the file that is read meanwhile.

    Raises:
      NeoError: the file cannot be written, or is the one that is read.
    """
    path, source = os.path.expanduser(path), os.path.expanduser(source)
    if path and source and os.path.realpath(path) == os.path.realpath(source):
        raise NeoError(f"--output {path} is the file that is read; name another.")
    new = not os.path.lexists(path)
    if is_remote(path):
        check_writable(make_path(path).parent)
    elif path and (new or os.path.isfile(path) or os.path.isdir(path)):  # no pipe, no device
        _open(path, "a").close()
        if new:
            with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
                os.unlink(path)


@contextlib.contextmanager
def output_lines(path: str) -> Iterator[IO[str]]:
    """Opens a file to write lines to, or stdout where the path is empty.

    Of several processes of a run the first writes the file, and the others nothing.

    Raises:
      NeoError: the file cannot be written, or another run is writing it.
    """
    if not path:
        yield sys.stdout
        return
    path = os.path.expanduser(path)
    stored = is_remote(path) or os.path.isfile(path) or not os.path.exists(path)
    with (
        holding(make_path(path)) if stored else contextlib.nullcontext(),  # no pipe, no device
        _open(path if is_leader() else os.devnull, "w") as file,
    ):
        yield file


def _open(path: str, mode: str) -> IO[str]:
    try:
        return make_path(path).open(mode, encoding="utf-8")
    except OSError as error:
        raise NeoError(f"cannot write {path}: {reason(error)}.") from error


def check_picture(path: str) -> None:
    """Checks before any work that a picture can be drawn and written; "" is none.

    Raises:
      NeoError: matplotlib is missing, the name is not that of a PNG file, or it cannot be written.
    """
    if not path:
        return
    figure.check_available()
    if not path.lower().endswith(".png"):
        raise NeoError(f"--picture draws a PNG file, not {path}; name one that ends in .png.")
    check_output(path)


def write_picture(path: str, picture: bytes) -> None:
    """Writes a picture, and its path on stderr; raises as `figure.write`."""
    figure.write(make_path(path), picture)
    print(path, file=sys.stderr)


def print_json(fields: dict[str, Any], file: IO[str] | None = None) -> None:
    """Prints an object as a line of JSON."""
    print(json.dumps(fields, ensure_ascii=False), file=file or sys.stdout, flush=True)


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Prints names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
