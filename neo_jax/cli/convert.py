"""neo-jax convert: the files of other programs."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

from tyro.conf import Positional

from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import check_output, output_lines
from neo_jax.cli.train import beside


@dataclasses.dataclass(frozen=True)
class Options:
    """Converts a .json config of EleutherAI/gpt-neo into a .py config for neo-jax train."""

    source: Positional[str] = ""  # the .json config, also gs://
    output: Positional[str] = ""  # the .py file to write


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "convert", args)
    if not options.source.endswith(".json") or not options.output.endswith(".py"):
        raise UsageError(
            "name a .json config and the .py file to write, as in: neo-jax convert theirs.json "
            "ours.py"
        )
    converted = _module("mesh_tf_config").convert(options.source)
    check_output(options.output)
    with output_lines(options.output) as file:
        file.write(converted.text)
    for note in converted.notes:
        print(note, file=sys.stderr)
    print(options.output)


def _module(name: str) -> Any:
    """Imports a module of `convert/`, wherever the package runs from."""
    path = beside("convert") / f"{name}.py"
    full = f"neo_jax.convert.{name}"
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
