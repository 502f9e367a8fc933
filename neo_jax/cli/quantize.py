"""neo-jax quantize: a checkpoint of int8 weights."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

from tyro.conf import Positional, arg

from neo_jax.cli import UsageError, parse


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes a checkpoint with int8 weights, which every verb but train and convert takes."""

    # a folder, also gs://, a hub name, or an adapter
    source: Annotated[Positional[str], arg(metavar="SOURCE")] = ""
    # the folder to write; new, or empty
    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "quantize", args)
    if not options.source or not options.output:
        raise UsageError(
            "name a model and the folder to write, as in: neo-jax quantize gpt-neo-1.3b small"
        )
    from neo_jax.checkpoints.save import new_folder, save_int8
    from neo_jax.text.load import load

    with new_folder(options.output) as folder:
        lm = load(options.source, quantize="int8", dtype="float32")
        save_int8(folder, lm.config, lm.params, tokenizer=lm.tokenizer)
        lm.defaults.save(folder)
    print(options.output)
