"""neo-jax convert: the files of other programs."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from neo_jax.cli import UsageError, parse
from neo_jax.cli.options import check_output, output_lines, print_json, print_table
from neo_jax.cli.train import installed_folder, load_config


@dataclasses.dataclass(frozen=True)
class Options:
    """Converts a checkpoint of GPT-Neo or GPT-2, of any format, to Hugging Face's, and checks it.

    Or to the folder of a run that is to take its first step; or a .json config of
    EleutherAI/gpt-neo to a .py config for neo-jax train.
    """

    # a folder with safetensors, pytorch_model.bin, flax_model.msgpack or a checkpoint of
    # TensorFlow; a run of neo-jax train; a hub name; or a .json config
    source: Annotated[Positional[str], arg(metavar="SOURCE")] = ""
    # a new folder, or the .py file to write
    output: Annotated[Positional[str], arg(metavar="OUTPUT")] = ""
    revision: str = ""  # of a hub repository
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"  # to store
    tokenizer: str = ""  # of a model, by name, or a folder of one, where the source has none
    max_shard_gb: float = 5.0  # above this size the weights go to several files
    # a config, as train takes it, of a run to begin with these weights: output is its folder
    train: str = ""
    verify: bool = True  # read all back and compare, logits with transformers too
    json: bool = False  # print JSON


def main(args: Sequence[str]) -> None:
    """Runs the verb."""
    options = parse(Options, "convert", args)
    if options.output.endswith(".py") and options.source.endswith(".json"):
        _convert_config(options)
        return
    if not options.source or not options.output or options.output.endswith((".py", ".json")):
        raise UsageError(
            "name a checkpoint and the folder to write, or a .json config and the .py file to "
            "write, as in: neo-jax convert theirs ours"
        )
    if not 0 < options.max_shard_gb < math.inf:
        raise UsageError(f"--max-shard-gb must be a number above 0, not {options.max_shard_gb}.")
    if options.train and (options.dtype != "keep" or options.tokenizer):
        raise UsageError("a run holds float32, and its data have the tokenizer: leave these out.")
    checkpoint = _module("checkpoint")
    revision = options.revision or None
    with checkpoint.open_source(options.source, revision, options.tokenizer) as source:
        folder, found = _write(checkpoint, source, options)
        fields = {
            "source": source.name,
            "output": str(folder),
            "family": source.config.family.name,
            "tokenizer": source.tokenizer is not None and not options.train,
            **(found._asdict() if found else {"verified": "no, as --no-verify asks"}),
        }
    if options.json:
        print_json(fields)
        return
    formats = {int: "{:,}".format, bool: lambda value: "written" if value else "none"}
    print_table(
        [(key.replace("_", " "), formats.get(type(v), str)(v)) for key, v in fields.items()]
    )


def _write(checkpoint: Any, source: Any, options: Options) -> tuple[Any, Any]:
    """Returns the folder that was written, and what was found in reading it back, or None."""
    if options.train:
        config = load_config(options.train)
        folder = checkpoint.convert_to_run(source, options.output, config)
        return folder, checkpoint.verify_run(source, folder, config) if options.verify else None
    dtype = "" if options.dtype == "keep" else options.dtype
    folder = checkpoint.convert(source, options.output, dtype, int(options.max_shard_gb * 10**9))
    return folder, checkpoint.verify(source, folder, dtype) if options.verify else None


def _convert_config(options: Options) -> None:
    converted = _module("mesh_tf_config").convert(options.source)
    check_output(options.output)
    with output_lines(options.output) as file:
        file.write(converted.text)
    for note in converted.notes:
        print(note, file=sys.stderr)
    print(options.output)


def _module(name: str) -> Any:
    """Imports a module of `convert/`, wherever the package runs from."""
    path = installed_folder("convert") / f"{name}.py"
    full = f"neo_jax.convert.{name}"
    spec = importlib.util.spec_from_file_location(full, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
